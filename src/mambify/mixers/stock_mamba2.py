"""Mamba2 as it is published and as transformers' ``Mamba2ForCausalLM`` has it: groups of heads share B, C and a norm.

Legend: B batch, T tokens, D hidden size, H heads, P head dimension, I inner channels (H·P), G groups of heads, N state
size, K conv width, C conv channels (I + 2·G·N).
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
from mambify.mixers.linear import PaddedLinear
from mambify.mixers.mamba2 import GatedRMSNorm
from mambify.ops.ring import RingPlace
from mambify.ops.ssd import ssd_scan, ssd_step
from mambify.ops.ssd_replay import SSDRing, ssd_replay

if TYPE_CHECKING:
    from mambify.config import HybridConfig


class StockMamba2Mixer(RecurrentMixer):
    """S_t = a_t S_{t-1} + Δ_t x_t B_tᵀ, y_t = S_t C_t + D x_t with one scalar a_t = exp(-exp(A_log) Δ_t) a head.

    ``in_proj`` rows are ``[z | x | B | C | dt]`` of I, I, G·N, G·N, H; x, B and C pass one depthwise causal convolution
    and SiLU. The output is ``out_proj(RMSNorm(y · SiLU(z)))``, a norm for the I / G channels of each group. Parameters
    have transformers' names. (arXiv 2405.21060, section 7.)

    Raises:
        InvalidOptionError: a field of the configuration that it needs is not set.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "D")

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        inner, H, G, N = config.ssm_inner_size, config.ssm_num_heads, config.ssm_num_groups, config.ssm_state_size
        if inner is None or H is None or G is None or N is None:
            raise InvalidOptionError(
                "stock_mamba2 needs ssm_inner_size, ssm_num_heads, ssm_num_groups and ssm_state_size"
            )
        self.num_heads, self.num_groups, self.head_dim, self.state_size = H, G, inner // H, N
        self.conv_split = [inner, G * N, G * N]
        self.dt_limits = config.ssm_dt_min, config.ssm_dt_max
        self.ops_backend = config.ops_backend
        channels = sum(self.conv_split)
        self.in_proj = PaddedLinear(config.hidden_size, inner + channels + H, bias=config.ssm_proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.ssm_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.norm = GatedRMSNorm(G, inner // G, config.rms_norm_eps, config.ops_backend)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.ssm_proj_bias)

    def forward(
        self, x_BTD: Tensor, context: MixerContext, state: RecurrentState | ReplayState | None = None
    ) -> tuple[Tensor, RecurrentState | ReplayState]:
        """Mixes T tokens, continuing from ``state``. Returns ``[B, T, D]`` and the state after the last token."""
        mask, D_H = context.padding_mask_BT, self.D.float()
        z_BTI, xBC_BTC, dt_BTH = self.in_proj(x_BTD).split(
            [self.conv_split[0], sum(self.conv_split), self.num_heads], dim=-1
        )
        if isinstance(state, ReplayState):
            xBC_BTC, _ = self.convolve(xBC_BTC, context, state)
            return self._out(self._replay(xBC_BTC, dt_BTH, state), z_BTI), state
        xBC_BTC = mask_padding(xBC_BTC, mask)  # not the input: in_proj may have a bias
        # With Δ = 0 padding neither writes into the state nor lets it decay, whatever the conv's bias makes of it.
        dt_BTH, A_H = mask_padding(self._step_sizes(dt_BTH), mask), self._decay()
        xBC_BTC, conv = self.convolve(xBC_BTC, context, state)
        x_BTHP, B_BTGN, C_BTGN = self._split(xBC_BTC)
        if xBC_BTC.shape[1] == 1 and state is not None:
            y_BHP, ssm = ssd_step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTGN[:, 0], D_H, state.ssm)
            return self._out(y_BHP[:, None], z_BTI), RecurrentState(conv, ssm)
        y_BTHP, ssm = ssd_scan(
            x_BTHP,
            dt_BTH,
            A_H,
            B_BTGN,
            C_BTGN,
            D_H,
            initial_state_BHPN=None if state is None else state.ssm,
            seq_idx_BT=context.seq_idx_BT,
            backend=self.ops_backend,
        )
        return self._out(y_BTHP, z_BTI), RecurrentState(conv, ssm)

    def _replay(self, xBC_STC: Tensor, dt_STH: Tensor, state: ReplayState) -> Tensor:
        """The outputs ``[S, T, H, P]`` of convolved new tokens, before the norm: one kernel, where Δ has no limits."""
        assert isinstance(state.ring, SSDRing)
        limited = self.dt_limits != (0.0, None)
        x_STHP, B_STGN, C_STGN = self._split(xBC_STC)
        return ssd_replay(
            x_STHP,
            self._step_sizes(dt_STH) if limited else dt_STH,
            state.A,
            B_STGN,
            C_STGN,
            self.D.float(),
            state.ssm,
            state.ring,
            state.place,
            dt_bias_H=None if limited else self.dt_bias.float(),
            backend=self.ops_backend,
        )

    def _step_sizes(self, dt_BTH: Tensor) -> Tensor:
        """Δ in float32, within its limits."""
        low, high = self.dt_limits
        delta_BTH = F.softplus(dt_BTH.float() + self.dt_bias.float())
        return delta_BTH.clamp(low, high) if low > 0 or high is not None else delta_BTH

    def _decay(self) -> Tensor:
        return -self.A_log.float().exp()

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cuts the convolved channels ``[..., C]`` into x ``[..., H, P]``, B and C ``[..., G, N]``."""
        x, B, C = xBC.split(self.conv_split, dim=-1)
        groups = (self.num_groups, self.state_size)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _out(self, y_BTHP: Tensor, z_BTI: Tensor) -> Tensor:
        groups = (self.num_groups, -1)
        normed_BTGE = self.norm(y_BTHP.flatten(2).unflatten(-1, groups), z_BTI.unflatten(-1, groups))
        out_BTD: Tensor = self.out_proj(normed_BTGE.flatten(2))
        return out_BTD

    def replay_state(self, slots: int, place: RingPlace) -> ReplayState:
        H, G, P, N = self.num_heads, self.num_groups, self.head_dim, self.state_size
        weight, R = self.out_proj.weight, place.capacity
        rings = SSDRing.zeros(1, slots, R, H=H, G=H, U=G, P=P, N=N, dtype=weight.dtype, device=weight.device)
        return ReplayState(
            weight.new_zeros(slots, R, sum(self.conv_split)),
            weight.new_zeros(slots, H, P, N, dtype=torch.float32),
            rings.layer(0),
            place,
            self._decay().detach(),
        )

    @torch.no_grad()
    def init_random(self) -> None:
        initialization.copy_(self.A_log, torch.linspace(1, 16, self.num_heads).log())
        bias = torch.empty(self.num_heads, device="cpu")
        initialization.copy_(self.dt_bias, initial.dt_bias_(bias, torch.Generator().manual_seed(0)))
        initialization.ones_(self.D)
        initialization.ones_(self.norm.weight)

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        assert config.ssm_inner_size and config.ssm_state_size and config.ssm_num_groups
        inner, N = config.ssm_inner_size, config.ssm_state_size
        return 4 * inner * N + (config.conv_kernel - 1) * (inner + 2 * config.ssm_num_groups * N) * element_size
