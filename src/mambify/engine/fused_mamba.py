"""Fused layers of Mamba1, hybrid and as published, and of Mamba2 as published; see :mod:`mambify.engine.fused`.

Letters: S slots, T tokens read at once, M = S·T rows, D hidden size, E outputs of a projection (of a norm: channels of
one), I inner channels, C conv channels, H heads, G groups of heads, P head dimension, N state size, K conv width.
"""

from __future__ import annotations

from torch import Tensor

from mambify.engine.fused_parts import MOST_FUSED, Product, Reading, State, Unfused
from mambify.mixers import RecurrentMixer, ReplayState
from mambify.mixers.mamba1 import Mamba1Mixer
from mambify.mixers.stock_mamba1 import StockMamba1Mixer
from mambify.mixers.stock_mamba2 import StockMamba2Mixer
from mambify.model import HybridBlock
from mambify.ops.decode_linear import Convolution
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.mamba1_step import Mamba1Weights, StepConv, mamba1_step
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing
from mambify.ops.ssd_replay import SSDRing, ssd_replay


class FusedStockMamba1:
    """norm + in_proj + convolution | x_proj | Δ, state, gate | out_proj + sum.

    Args:
        at_once: tokens stand, and the state goes on with each of them.
    """

    def __init__(self, block: HybridBlock, state: State, product: Product, at_once: bool) -> None:
        mixer = block.mixer
        assert isinstance(mixer, StockMamba1Mixer) and isinstance(state, ReplayState)
        assert isinstance(state.ring, SelectiveRing)
        self._block, self._mixer, self._state, self._product = block, mixer, state, product
        self._ring, self._as_it_is = None if at_once else state.ring, Unfused(block, state)
        self._taps_IK, self._conv_bias_I = _taps(mixer)
        self._weights = Mamba1Weights(
            mixer.dt_proj.weight.detach(), mixer.dt_proj.bias.detach(), state.A, mixer.D.detach()[None]
        )

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        if len(x_MD) > MOST_FUSED:
            return self._as_it_is(x_MD, reading)
        mixer, state, N = self._mixer, self._state, self._mixer.state_size
        convolution = Convolution(0, self._taps_IK, self._conv_bias_I, state.conv, reading.place)
        xz_ME, x_MI = self._product.convolved(x_MD, mixer.in_proj, convolution, norm=self._block.input_layernorm)
        z_MI = xz_ME.chunk(2, dim=-1)[1]
        dtBC_STE = self._product(x_MI, [mixer.x_proj]).unflatten(0, reading.shape)
        dt_STE, B_STN, C_STN = dtBC_STE.split([mixer.dt_rank, N, N], dim=-1)
        y_STI = mamba1_step(
            x_MI.unflatten(0, reading.shape),
            z_MI.unflatten(0, reading.shape),
            dt_STE,
            B_STN[:, :, None, None],
            C_STN[:, :, None],
            self._weights,
            state.ssm,
            self._ring,
            reading.place,
            overlap=self._product.overlap,
            backend=mixer.ops_backend,
        )
        return self._product(y_STI.flatten(0, 1), [mixer.out_proj], add_to=x_MD)


class FusedMamba1:
    """norm + in_proj | convolution, Δ, state, gate | out_proj + sum; arguments as of :class:`FusedStockMamba1`.

    Key/value heads of x are repeated before the convolution, so it is not the projection's programs that make it.
    """

    def __init__(self, block: HybridBlock, state: State, product: Product, at_once: bool) -> None:
        mixer = block.mixer
        assert isinstance(mixer, Mamba1Mixer) and isinstance(state, ReplayState)
        assert isinstance(state.ring, SelectiveRing)
        self._block, self._mixer, self._state, self._product = block, mixer, state, product
        self._ring, self._as_it_is = None if at_once else state.ring, Unfused(block, state)
        self._conv = StepConv(*_taps(mixer), state.conv)
        self._BN, self._CN = (mixer.num_groups, -1, mixer.state_size), (-1, mixer.state_size)
        biases: tuple[Tensor | None, Tensor | None] = None, None
        if mixer.BC_bias is not None:
            B_bias, C_bias = mixer.BC_bias.detach().split(mixer.split[2:4])
            biases = B_bias.view(self._BN), C_bias.view(self._CN)
        self._weights = Mamba1Weights(
            mixer.dt_proj.weight.detach(),
            mixer.dt_proj.bias.detach(),
            state.A,
            mixer.D.detach().view(self._CN),
            *biases,
        )

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        if len(x_MD) > MOST_FUSED:
            return self._as_it_is(x_MD, reading)
        mixer, state = self._mixer, self._state
        projected_ME = self._product(x_MD, [mixer.in_proj], norm=self._block.input_layernorm)
        z, x, B, C, dt = projected_ME.unflatten(0, reading.shape).split(mixer.split, dim=-1)
        y_STI = mamba1_step(
            x,
            z,
            dt,
            B.unflatten(-1, self._BN),
            C.unflatten(-1, self._CN),
            self._weights,
            state.ssm,
            self._ring,
            reading.place,
            conv=self._conv,
            overlap=self._product.overlap,
            backend=mixer.ops_backend,
        )
        return self._product(y_STI.flatten(0, 1), [mixer.out_proj], add_to=x_MD)


class FusedStockMamba2:
    """norm + in_proj + convolution | Δ, replay | gated norm | out_proj + sum, whether tokens stand or not."""

    def __init__(self, block: HybridBlock, state: State, product: Product, at_once: bool) -> None:
        mixer = block.mixer
        assert isinstance(mixer, StockMamba2Mixer) and isinstance(state, ReplayState)
        assert isinstance(state.ring, SSDRing) and not at_once
        self._block, self._mixer, self._state, self._product = block, mixer, state, product
        self._ring, self._A_H = state.ring, state.A
        self._taps_CK, self._conv_bias_C = _taps(mixer)
        self._D_H, self._dt_bias_H = mixer.D.detach().float(), mixer.dt_bias.detach().float()
        self._norm_GE = mixer.norm.weight.detach().view(mixer.num_groups, -1)

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        mixer = self._mixer
        inner, H = mixer.conv_split[0], mixer.num_heads
        channels = Convolution(inner, self._taps_CK, self._conv_bias_C, self._state.conv, reading.place)
        zxBCdt_ME, xBC_MC = self._product.convolved(x_MD, mixer.in_proj, channels, norm=self._block.input_layernorm)
        z_STI, _, dt_STH = zxBCdt_ME.unflatten(0, reading.shape).split([inner, sum(mixer.conv_split), H], dim=-1)
        y_STHP = self._replay(xBC_MC.unflatten(0, reading.shape), dt_STH, reading.place)
        norms = (mixer.num_groups, -1)
        normed_STGE = gated_rms_norm(
            y_STHP.flatten(2).unflatten(-1, norms), z_STI.unflatten(-1, norms), self._norm_GE, mixer.norm.eps,
            mixer.ops_backend,
        )  # fmt: skip
        return self._product(normed_STGE.flatten(0, 1).flatten(1), [mixer.out_proj], add_to=x_MD)

    def _replay(self, xBC_STC: Tensor, dt_STH: Tensor, place: RingPlace) -> Tensor:
        mixer, groups = self._mixer, (self._mixer.num_groups, self._mixer.state_size)
        x, B, C = xBC_STC.split(mixer.conv_split, dim=-1)
        return ssd_replay(
            x.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
            dt_STH,
            self._A_H,
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
            self._D_H,
            self._state.ssm,
            self._ring,
            place,
            dt_bias_H=self._dt_bias_H,
            overlap=self._product.overlap,
            backend=mixer.ops_backend,
        )


def _taps(mixer: RecurrentMixer) -> tuple[Tensor, Tensor | None]:
    """Weight ``[C, K]`` and bias of the convolution."""
    bias = mixer.conv1d.bias
    return mixer.conv1d.weight.detach().squeeze(1), None if bias is None else bias.detach()
