"""The Mamba2 mixer in the stock layout, one SSM group a head, built from an attention layer (V→x, K→B, Q→C).

Legend: B batch, T tokens, D hidden size, H query heads, G key/value heads, P head dimension, N state size (= P),
K conv width, C conv channels (G·P + G·N + H·N).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

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
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.ring import RingPlace
from mambify.ops.ssd import ssd_scan, ssd_step
from mambify.ops.ssd_replay import SSDRing, ssd_replay

if TYPE_CHECKING:
    from mambify.config import HybridConfig


class GatedRMSNorm(nn.Module):
    """RMSNorm of y·SiLU(z) over each head's P channels; weight ``[H·P]`` as in the stock layout."""

    def __init__(self, num_heads: int, head_dim: int, eps: float, ops_backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.num_heads, self.eps, self.ops_backend = num_heads, eps, ops_backend

    def forward(self, y_BTHP: Tensor, z_BTHP: Tensor) -> Tensor:
        return gated_rms_norm(y_BTHP, z_BTHP, self.weight.view(self.num_heads, -1), self.eps, self.ops_backend)


class Mamba2Mixer(RecurrentMixer):
    """S_t = a_t S_{t-1} + Δ_t x_t B_tᵀ, y_t = S_t C_t + D x_t with one scalar a_t = exp(-exp(A_log) Δ_t) a head.

    ``in_proj`` rows are ``[z | x | B | C | dt]`` of H·P, G·P, G·N, H·N, H; x, B and C pass one depthwise causal
    convolution and SiLU before the key/value heads are shared among their query heads. The output is
    ``out_proj(RMSNorm_per_head(y · SiLU(z)))``. (arXiv 2408.15237, section 2.2; SSD: arXiv 2405.21060.)
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "D")
    starts: ClassVar[tuple[str, ...]] = ("identity", "paper", "random")

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.head_dim and config.num_key_value_heads
        H, G, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_heads, self.num_groups, self.head_dim, self.state_size = H, G, P, P
        self.conv_split = [G * P, G * P, H * P]
        self.ops_backend = config.ops_backend
        channels = sum(self.conv_split)
        self.in_proj = PaddedLinear(config.hidden_size, H * P + channels + H, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels)
        self.dt_bias = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(H, dtype=torch.float32))
        self.norm = GatedRMSNorm(H, P, config.rms_norm_eps, config.ops_backend)
        self.out_proj = nn.Linear(H * P, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self, x_BTD: Tensor, context: MixerContext, state: RecurrentState | ReplayState | None = None
    ) -> tuple[Tensor, RecurrentState | ReplayState]:
        """Mixes T tokens, continuing from ``state``. Returns ``[B, T, D]`` and the state after the last token."""
        B, T, _ = x_BTD.shape
        mask = context.padding_mask_BT
        A_H = state.A if isinstance(state, ReplayState) else self._decay()
        zxBCdt = self.in_proj(mask_padding(x_BTD, mask))
        z_BTI, xBC_BTC, dt_BTH = zxBCdt.split(
            [self.num_heads * self.head_dim, sum(self.conv_split), self.num_heads], dim=-1
        )
        z_BTHP = z_BTI.unflatten(-1, (self.num_heads, self.head_dim))
        # With Δ = 0 padding neither writes into the state nor lets it decay, whatever the conv's bias makes of it.
        dt_BTH = mask_padding(F.softplus(dt_BTH.float() + self.dt_bias.float()), mask)
        xBC_BTC, conv = self.convolve(xBC_BTC, context, state)
        x_BTGP, B_BTGN, C_BTHN = self._split_heads(xBC_BTC)

        after: RecurrentState | ReplayState
        if isinstance(state, ReplayState):
            assert isinstance(state.ring, SSDRing)
            y_BTHP = ssd_replay(
                x_BTGP,
                dt_BTH,
                A_H,
                B_BTGN,
                C_BTHN,
                self.D.float(),
                state.ssm,
                state.ring,
                state.place,
                backend=self.ops_backend,
            )
            after = state
        elif T == 1 and state is not None:
            y_BHP, ssm = ssd_step(
                x_BTGP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTHN[:, 0], self.D.float(), state.ssm
            )
            y_BTHP, after = y_BHP[:, None], RecurrentState(conv, ssm)
        else:
            y_BTHP, ssm = ssd_scan(
                x_BTGP,
                dt_BTH,
                A_H,
                B_BTGN,
                C_BTHN,
                self.D.float(),
                initial_state_BHPN=None if state is None else state.ssm,
                seq_idx_BT=context.seq_idx_BT,
                backend=self.ops_backend,
            )
            after = RecurrentState(conv, ssm)
        return self.out_proj(self.norm(y_BTHP, z_BTHP).reshape(B, T, -1)), after

    def replay_state(self, slots: int, place: RingPlace) -> ReplayState:
        H, G, P, N = self.num_heads, self.num_groups, self.head_dim, self.state_size
        weight, R = self.out_proj.weight, place.capacity
        rings = SSDRing.zeros(1, slots, R, H=H, G=G, P=P, N=N, dtype=weight.dtype, device=weight.device)
        return ReplayState(
            weight.new_zeros(slots, R, sum(self.conv_split)),
            weight.new_zeros(slots, H, P, N, dtype=torch.float32),
            rings.layer(0),
            place,
            self._decay().detach(),
        )

    def _decay(self) -> Tensor:
        return -self.A_log.float().exp()

    def _split_heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cuts the convolved channels ``[..., C]`` into x ``[..., G, P]``, B ``[..., G, N]``, C ``[..., H, N]``."""
        x, B, C = xBC.split(self.conv_split, dim=-1)
        groups, heads = (self.num_groups, self.head_dim), (self.num_heads, self.state_size)
        return x.unflatten(-1, groups), B.unflatten(-1, groups), C.unflatten(-1, heads)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights, *, start: str, generator: torch.Generator) -> None:
        """``paper``: conv, z and dt at random as published; ``identity``: the conv passes its input on; ``random``: as
        ``paper``, with nothing of the attention either.

        Biases of q, k, v enter through the conv bias (exact where the conv is the identity). Qwen3's per-head norms
        have no counterpart; their weights scale B and C.
        """
        if start == "random":
            weights = weights.drawn_anew(generator)
        z, x, B, C, dt = self.rows
        x.copy_(weights.v)
        B.copy_(initial.scaled_rows(weights.k, weights.k_norm))
        C.copy_(initial.scaled_rows(weights.q, weights.q_norm))
        initial.linear_(z, generator)
        initial.linear_(dt, generator)
        initial.dt_bias_(self.dt_bias, generator)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16, generator=generator).log())
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)
        self.out_proj.weight.copy_(weights.o)
        if self.out_proj.bias is not None and weights.o_bias is not None:
            self.out_proj.bias.copy_(weights.o_bias)
        assert self.conv1d.bias is not None
        biases = [
            torch.zeros(size, dtype=weights.q.dtype) if bias is None else initial.scaled_rows(bias, norm)
            for bias, norm, size in zip(
                (weights.v_bias, weights.k_bias, weights.q_bias),
                (None, weights.k_norm, weights.q_norm),
                self.conv_split,
                strict=True,
            )
        ]
        self.conv1d.bias.copy_(torch.cat([bias.to(self.conv1d.bias.device) for bias in biases]))
        if start != "identity":
            initial.uniform_(self.conv1d.weight, self.conv1d.kernel_size[0] ** -0.5, generator)
        else:
            initial.identity_conv_(self.conv1d.weight)

    @property
    def rows(self) -> ProjectionRows:
        sizes = [self.num_heads * self.head_dim, *self.conv_split, self.num_heads]
        return ProjectionRows(*self.in_proj.weight.split(sizes, dim=0))

    @torch.no_grad()
    def set_decay(self, kept_H: Tensor) -> None:
        self.rows.dt.zero_()
        self.A_log.zero_()
        self.dt_bias.copy_(initial.inverse_softplus(-kept_H.log()))

    @torch.no_grad()
    def scale_memory(self, factor_H: Tensor) -> None:
        """Multiplies what each head reads out of its state, and D, leaving its decay: Δ grows, A shrinks.

        Exact where Δ does not depend on the token.
        """
        self.dt_bias.copy_(initial.inverse_softplus(F.softplus(self.dt_bias) * factor_H))
        self.A_log.sub_(factor_H.log())
        self.D.mul_(factor_H)

    def query_bias(self) -> Tensor:
        assert self.conv1d.bias is not None
        bias_C: Tensor = self.conv1d.bias.split(self.conv_split)[2]
        return bias_C

    @torch.no_grad()
    def scale_activations(self, x_BTD: Tensor, *, values: float, keys: float) -> None:
        first = self.num_heads * self.head_dim
        xBC_BTC = F.linear(x_BTD, self.in_proj.weight[first : first + sum(self.conv_split)])
        blocks = [size // self.head_dim for size in self.conv_split]
        rms = [values] * blocks[0] + [keys] * (blocks[1] + blocks[2])
        initial.scale_conv_(self.conv1d, xBC_BTC, x_BTD.new_tensor(rms))

    @torch.no_grad()
    def init_random(self) -> None:
        initialization.copy_(self.A_log, torch.linspace(1, 16, self.num_heads).log())
        initialization.copy_(
            self.dt_bias, initial.dt_bias_(torch.empty(self.num_heads, device="cpu"), torch.Generator().manual_seed(0))
        )
        initialization.ones_(self.D)
        initialization.ones_(self.norm.weight)

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        assert config.num_key_value_heads and config.head_dim
        H, G, P = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return 4 * H * P * P + (config.conv_kernel - 1) * (2 * G * P + H * P) * element_size
