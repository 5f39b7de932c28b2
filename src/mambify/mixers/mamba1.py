"""The Mamba1 mixer built from an attention layer: every head is P/N sub-heads with their own B and C.

Legend: B batch, T tokens, D hidden size, H query heads, G key/value heads, P head dimension, N state size (16),
J sub-heads (H·P/N), M channels a sub-head (= N), I inner channels (H·P = J·M), K conv width, R rank of Δ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from mambify.errors import UnsupportedError
from mambify.mixers import initial
from mambify.mixers.base import (
    AttentionWeights,
    MixerContext,
    ProjectionRows,
    RecurrentMixer,
    RecurrentState,
    ReplayState,
    mask_padding,
)
from mambify.mixers.linear import PaddedLinear
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing, selective_replay
from mambify.ops.selective_scan import selective_scan, selective_scan_step

if TYPE_CHECKING:
    from mambify.config import HybridConfig


class Mamba1Mixer(RecurrentMixer):
    """S_t = exp(Δ_t A) ⊙ S_{t-1} + (Δ_t x_t) ⊗ B_t, y_t = S_t C_t + D x_t with Δ and A of every channel its own.

    ``in_proj`` rows are ``[z | x | B | C | dt]`` of H·P, G·P, G·P, H·P, R. Sub-block j of a query head meets sub-block
    j of its own key/value head: y is the block-diagonal part of linear attention with blocks of N. Only x passes the
    convolution, after its heads are repeated. The output is ``out_proj(y · SiLU(z))``. (arXiv 2408.15237, algorithm 1.)

    Raises:
        UnsupportedError: the head dimension is not a multiple of N.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D")
    starts: ClassVar[tuple[str, ...]] = ("identity", "paper", "random")

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.head_dim and config.num_key_value_heads and config.mamba1_dt_rank
        H, G, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        N = config.mamba1_state_size
        if P % N:
            raise UnsupportedError(f"mamba1 needs a head dimension that is a multiple of {N}; this model has {P}")
        self.num_heads, self.num_groups, self.head_dim, self.state_size = H, G, P, N
        self.ops_backend = config.ops_backend
        self.dt_rank = config.mamba1_dt_rank
        inner = H * P
        self.split = [inner, G * P, G * P, H * P, self.dt_rank]
        self.in_proj = PaddedLinear(config.hidden_size, sum(self.split), bias=False)
        self.BC_bias = nn.Parameter(torch.zeros(G * P + H * P)) if config.attention_bias else None
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, N, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self, x_BTD: Tensor, context: MixerContext, state: RecurrentState | ReplayState | None = None
    ) -> tuple[Tensor, RecurrentState | ReplayState]:
        """Mixes T tokens, continuing from ``state``. Returns ``[B, T, D]`` and the state after the last token."""
        T, mask = x_BTD.shape[1], context.padding_mask_BT
        z, x, B, C, dt = self.in_proj(mask_padding(x_BTD, mask)).split(self.split, dim=-1)
        if self.BC_bias is not None:
            B_bias, C_bias = self.BC_bias.split(self.split[2:4])
            B, C = B + B_bias, C + C_bias
        x_BTI, B_BTI = self._repeat_heads(x), self._repeat_heads(B)
        # With Δ = 0 padding neither writes into the state nor lets it decay, whatever the conv's bias makes of it.
        dt_BTI = mask_padding(F.softplus(self.dt_proj(dt).float()), mask)
        A_JMN = state.A if isinstance(state, ReplayState) else self._decay()
        D_JM = self._sub_heads(self.D.float())
        B_BTJN, C_BTJN, dt_BTJM = self._sub_heads(B_BTI), self._sub_heads(C), self._sub_heads(dt_BTI)
        x_BTI, conv = self.convolve(x_BTI, context, state)
        x_BTJM = self._sub_heads(x_BTI)

        after: RecurrentState | ReplayState
        if isinstance(state, ReplayState):
            assert isinstance(state.ring, SelectiveRing)
            y_BTJM = selective_replay(
                x_BTJM,
                dt_BTJM,
                A_JMN,
                self._sub_heads(B).unflatten(2, (self.num_groups, -1)),
                C_BTJN,
                D_JM,
                state.ssm,
                state.ring,
                state.place,
                backend=self.ops_backend,
            )
            y_BTI, after = y_BTJM.flatten(2), state
        elif T == 1 and state is not None:
            y_BJM, ssm = selective_scan_step(
                x_BTJM[:, 0], dt_BTJM[:, 0], A_JMN, B_BTJN[:, 0], C_BTJN[:, 0], D_JM, state.ssm
            )
            y_BTI, after = y_BJM.flatten(1)[:, None], RecurrentState(conv, ssm)
        else:
            y_BTJM, ssm = selective_scan(
                x_BTJM,
                dt_BTJM,
                A_JMN,
                B_BTJN,
                C_BTJN,
                D_JM,
                initial_state_BJMN=None if state is None else state.ssm,
                seq_idx_BT=context.seq_idx_BT,
                backend=self.ops_backend,
            )
            y_BTI, after = y_BTJM.flatten(2), RecurrentState(conv, ssm)
        return self.out_proj(y_BTI.to(z.dtype) * F.silu(z)), after

    def replay_state(self, slots: int, place: RingPlace) -> ReplayState:
        N, inner, G = self.state_size, self.num_heads * self.head_dim, self.num_groups
        J, U, R = inner // N, self.head_dim // N, place.capacity
        weight = self.out_proj.weight
        rings = SelectiveRing.zeros(1, slots, R, J=J, M=N, G=G, U=U, N=N, dtype=weight.dtype, device=weight.device)
        return ReplayState(
            weight.new_zeros(slots, R, inner),
            weight.new_zeros(slots, J, N, N, dtype=torch.float32),
            rings.layer(0),
            place,
            self._decay().detach(),
        )

    def _decay(self) -> Tensor:
        return -self._sub_heads(self.A_log.float().exp(), dim=0)

    def _repeat_heads(self, x_BTE: Tensor) -> Tensor:
        """Gives each query head its key/value head's channels: ``[B, T, G·P]`` to ``[B, T, H·P]``."""
        heads: Tensor = x_BTE.unflatten(-1, (self.num_groups, self.head_dim))
        return heads.repeat_interleave(self.num_heads // self.num_groups, dim=-2).flatten(-2)

    def _sub_heads(self, x: Tensor, dim: int = -1) -> Tensor:
        """Cuts the inner channels I = H·P into J sub-heads of N."""
        sub_heads: Tensor = x.unflatten(dim, (-1, self.state_size))
        return sub_heads

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights, *, start: str, generator: torch.Generator) -> None:
        """``paper``: conv, z and dt at random as published; ``identity``: the conv passes its input on; ``random``: as
        ``paper``, with nothing of the attention either.

        A q or k bias becomes ``BC_bias``; the v bias enters through the conv bias. Qwen3's per-head norms have no
        counterpart; their weights scale B and C.
        """
        if start == "random":
            weights = weights.drawn_anew(generator)
        z, x, B, C, dt = self.rows
        x.copy_(weights.v)
        B.copy_(initial.scaled_rows(weights.k, weights.k_norm))
        C.copy_(initial.scaled_rows(weights.q, weights.q_norm))
        initial.linear_(z, generator)
        initial.linear_(dt, generator)
        initial.uniform_(self.dt_proj.weight, self.dt_rank**-0.5, generator)
        initial.dt_bias_(self.dt_proj.bias, generator)
        N = self.state_size
        self.A_log.copy_(torch.arange(1, N + 1, dtype=torch.float32).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.out_proj.weight.copy_(weights.o)
        if self.out_proj.bias is not None and weights.o_bias is not None:
            self.out_proj.bias.copy_(weights.o_bias)
        assert self.conv1d.bias is not None
        self.conv1d.bias.zero_()
        if weights.v_bias is not None:
            self.conv1d.bias.copy_(self._repeat_heads(weights.v_bias))
        if self.BC_bias is not None and weights.k_bias is not None and weights.q_bias is not None:
            biases = (weights.k_bias, weights.k_norm), (weights.q_bias, weights.q_norm)
            self.BC_bias.copy_(torch.cat([initial.scaled_rows(bias, norm) for bias, norm in biases]))
        if start != "identity":
            initial.uniform_(self.conv1d.weight, self.conv1d.kernel_size[0] ** -0.5, generator)
        else:
            initial.identity_conv_(self.conv1d.weight)

    @property
    def rows(self) -> ProjectionRows:
        return ProjectionRows(*self.in_proj.weight.split(self.split, dim=0))

    @torch.no_grad()
    def set_decay(self, kept_H: Tensor) -> None:
        self.dt_proj.weight.zero_()  # and not the rows of dt: a product of two zeros would never learn
        self.A_log.zero_()
        self.dt_proj.bias.copy_(initial.inverse_softplus(-kept_H.log()).repeat_interleave(self.head_dim))

    def query_bias(self) -> Tensor | None:
        return None if self.BC_bias is None else self.BC_bias.split(self.split[2:4])[1]

    @torch.no_grad()
    def scale_activations(self, x_BTD: Tensor, *, values: float, keys: float) -> None:
        """Only the values are activated; ``keys`` says nothing here."""
        x_BTI = self._repeat_heads(F.linear(x_BTD, self.rows.x))
        initial.scale_conv_(self.conv1d, x_BTI, x_BTD.new_full((self.num_heads,), values))

    @torch.no_grad()
    def init_random(self) -> None:
        N = self.state_size
        initialization.copy_(self.A_log, torch.arange(1, N + 1).float().log().expand(self.A_log.shape).contiguous())
        initialization.copy_(
            self.dt_proj.bias,
            initial.dt_bias_(torch.empty(self.D.shape, device="cpu"), torch.Generator().manual_seed(0)),
        )
        initialization.ones_(self.D)
        if self.BC_bias is not None:
            initialization.zeros_(self.BC_bias)

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        assert config.head_dim
        inner = config.num_attention_heads * config.head_dim
        return 4 * inner * config.mamba1_state_size + (config.conv_kernel - 1) * inner * element_size
