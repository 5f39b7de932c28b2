"""Mamba1 as it is published and as transformers' ``MambaForCausalLM`` has it: all channels share one B and one C.

Legend: B batch, T tokens, D hidden size, I inner channels, N state size, K conv width, R rank of Δ. To the operations
it is one sub-head of all channels, J = 1 and M = I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from mambify.errors import InvalidOptionError
from mambify.mixers import initial
from mambify.mixers.base import MixerContext, RecurrentMixer, RecurrentState, ReplayState, mask_padding
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing, selective_replay
from mambify.ops.selective_scan import selective_scan, selective_scan_step

if TYPE_CHECKING:
    from mambify.config import HybridConfig


class StockMamba1Mixer(RecurrentMixer):
    """S_t = exp(Δ_t A) ⊙ S_{t-1} + (Δ_t x_t) ⊗ B_t, y_t = S_t C_t + D x_t (arXiv 2312.00752, algorithm 2).

    ``in_proj`` rows are ``[x | z]``. x passes a depthwise causal convolution and SiLU; ``x_proj`` of what comes out is
    ``[dt | B | C]`` of R, N, N. The output is ``out_proj(y · SiLU(z))``. Parameters have transformers' names.

    Raises:
        InvalidOptionError: a field of the configuration that it needs is not set.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D")

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        inner, N, R = config.ssm_inner_size, config.ssm_state_size, config.ssm_dt_rank
        if inner is None or N is None or R is None:
            raise InvalidOptionError("stock_mamba1 needs ssm_inner_size, ssm_state_size and ssm_dt_rank")
        self.state_size, self.dt_rank = N, R
        self.ops_backend = config.ops_backend
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.ssm_proj_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, bias=config.ssm_conv_bias)
        self.x_proj = nn.Linear(inner, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, inner)
        self.A_log = nn.Parameter(torch.empty(inner, N, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.ssm_proj_bias)

    def forward(
        self, x_BTD: Tensor, context: MixerContext, state: RecurrentState | ReplayState | None = None
    ) -> tuple[Tensor, RecurrentState | ReplayState]:
        """Mixes T tokens, continuing from ``state``. Returns ``[B, T, D]`` and the state after the last token."""
        mask = context.padding_mask_BT
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, dim=-1)
        if isinstance(state, ReplayState):
            x_BTI, _ = self.convolve(x_BTI, context, state)
            return self.out_proj(self._replay(x_BTI, z_BTI, state)), state
        x_BTI = mask_padding(x_BTI, mask)  # not the input: in_proj may have a bias
        T, D_1I, A_1IN = x_BTI.shape[1], self.D.float()[None], self._decay()
        x_BTI, conv = self.convolve(x_BTI, context, state)
        dt_BTI, B_BTN, C_BTN = self._select(x_BTI)
        # With Δ = 0 padding neither writes into the state nor lets it decay, whatever the conv's bias makes of it.
        dt_BTI = mask_padding(F.softplus(dt_BTI.float() + self.dt_proj.bias.float()), mask)
        if T == 1 and state is not None:  # the axis of the one token serves as that of the one sub-head
            y_BTI, ssm = selective_scan_step(x_BTI, dt_BTI, A_1IN, B_BTN, C_BTN, D_1I, state.ssm)
        else:
            y_BT1I, ssm = selective_scan(
                x_BTI[:, :, None],
                dt_BTI[:, :, None],
                A_1IN,
                B_BTN[:, :, None],
                C_BTN[:, :, None],
                D_1I,
                initial_state_BJMN=None if state is None else state.ssm,
                seq_idx_BT=context.seq_idx_BT,
                backend=self.ops_backend,
            )
            y_BTI = y_BT1I.flatten(2)
        return self.out_proj(y_BTI.to(z_BTI.dtype) * F.silu(z_BTI)), RecurrentState(conv, ssm)

    def _replay(self, x_STI: Tensor, z_STI: Tensor, state: ReplayState) -> Tensor:
        """The gated outputs ``[S, T, I]`` of convolved new tokens: a kernel beside the two small projections."""
        assert isinstance(state.ring, SelectiveRing)
        dt_STI, B_STN, C_STN = self._select(x_STI)
        y_ST1I = selective_replay(
            x_STI[:, :, None],
            dt_STI[:, :, None],
            state.A,
            B_STN[:, :, None, None],
            C_STN[:, :, None],
            self.D.float()[None],
            state.ssm,
            state.ring,
            state.place,
            dt_bias_JM=self.dt_proj.bias[None],
            z_STJM=z_STI[:, :, None],
            backend=self.ops_backend,
        )
        return y_ST1I.flatten(2)

    def _select(self, x_BTI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is made of the convolved x: dt ``[B, T, I]`` without its bias, B and C ``[B, T, N]``."""
        N = self.state_size
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTI).split([self.dt_rank, N, N], dim=-1)
        return F.linear(dt_BTR, self.dt_proj.weight), B_BTN, C_BTN

    def _decay(self) -> Tensor:
        return -self.A_log.float().exp()[None]

    def replay_state(self, slots: int, place: RingPlace) -> ReplayState:
        (inner, N), R, weight = self.A_log.shape, place.capacity, self.out_proj.weight
        rings = SelectiveRing.zeros(1, slots, R, J=1, M=inner, G=1, U=1, N=N, dtype=weight.dtype, device=weight.device)
        return ReplayState(
            weight.new_zeros(slots, R, inner),
            weight.new_zeros(slots, 1, inner, N, dtype=torch.float32),
            rings.layer(0),
            place,
            self._decay().detach(),
        )

    @torch.no_grad()
    def init_random(self) -> None:
        N = self.state_size
        initialization.copy_(self.A_log, torch.arange(1, N + 1).float().log().expand(self.A_log.shape).contiguous())
        bias = torch.empty(self.D.shape, device="cpu")
        initialization.copy_(self.dt_proj.bias, initial.dt_bias_(bias, torch.Generator().manual_seed(0)))
        initialization.ones_(self.D)

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        assert config.ssm_inner_size and config.ssm_state_size
        return config.ssm_inner_size * (4 * config.ssm_state_size + (config.conv_kernel - 1) * element_size)
