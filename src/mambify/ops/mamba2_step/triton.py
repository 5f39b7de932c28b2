"""One token of a Mamba2 mixer as a Triton kernel: a program is one row and one query head.

The norm is over a head's P channels, so a program has them all. Heads of a group each convolve the x and B that they
share, which is little beside the state; one of them writes these inputs into the ring, at the head, while all read the
K − 1 places before it. What would be rounded between separate operations is rounded here too.

Letters: S rows, H query heads, G key/value heads, P head dimension, N state size, C conv channels, K conv width, R
places of the ring; in kernels P = BLOCK_P and N = BLOCK_N are the axes of tiles.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.overlap import launch_options, wait_for_others
from mambify.ops.ring import RingPlace, check_contiguous
from mambify.ops.triton_math import softplus

_WIDEST = 128


def supports(zxBCdt_SE: Tensor, conv_CK: Tensor, state_SHPN: Tensor, ring_SRC: Tensor) -> bool:
    """Whether the kernel takes these inputs: P and N up to 128, inputs and ring in one dtype, no float64."""
    return (
        max(state_SHPN.shape[2:]) <= _WIDEST
        and zxBCdt_SE.dtype == ring_SRC.dtype
        and zxBCdt_SE.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and conv_CK.dtype != torch.float64
        and state_SHPN.dtype == torch.float32
    )


def mamba2_step(
    zxBCdt_SE: Tensor,
    conv_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_HP: Tensor,
    eps: float,
    state_SHPN: Tensor,
    ring_SRC: Tensor,
    place: RingPlace,
    groups: int,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.mamba2_step.mamba2_step`."""
    slots, heads, P, N = state_SHPN.shape
    check_contiguous("mamba2_step", state_SHPN, ring_SRC)
    zxBCdt_SE = zxBCdt_SE if zxBCdt_SE.stride(1) == 1 else zxBCdt_SE.contiguous()
    out_SHP = zxBCdt_SE.new_empty((slots, heads, P))
    block_p, block_n = (triton.next_power_of_2(size) for size in (P, N))
    with torch.cuda.device_of(zxBCdt_SE):  # Triton launches on the current device
        _step[(heads, slots)](
            zxBCdt_SE, conv_CK.contiguous(), conv_bias_C, dt_bias_H, A_H, D_H, norm_HP.contiguous(), state_SHPN,
            ring_SRC, out_SHP, place.head_S, place.active_S, eps, zxBCdt_SE.stride(0),
            H=heads, G=groups, P=P, N=N, K=conv_CK.shape[1], R=place.capacity, BLOCK_P=block_p, BLOCK_N=block_n,
            BLOCK_K=triton.next_power_of_2(conv_CK.shape[1]), RAGGED=(block_p, block_n) != (P, N),
            num_warps=max(1, block_p * block_n // 1024),  # 32 entries a thread
            **launch_options(overlap),
        )  # fmt: skip
    return out_SHP


@triton.jit
def _step(
    in_ptr, conv_ptr, conv_bias_ptr, dt_bias_ptr, A_ptr, D_ptr, norm_ptr, state_ptr, ring_ptr, out_ptr,
    head_ptr, active_ptr, eps, in_row,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    h, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g = h // (H // G)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    head, active = tl.load(head_ptr + row).to(tl.int32), tl.load(active_ptr + row) != 0
    out = out_ptr + (row * H + h) * P + p
    if active:
        tile, here = state_ptr + ((row * H + h) * P + p[:, None]) * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
        s = tl.load(tile, mask=here, other=0.0) if RAGGED else tl.load(tile)
        C: tl.constexpr = G * P + G * N + H * N
        in_ptr += row * in_row
        z = tl.load(in_ptr + h * P + p, mask=p < P, other=0.0)
        ring_ptr += row * R * C
        xBC = in_ptr + H * P
        # Of the heads that share x and B the first one writes them.
        shares = tl.where(h % (H // G) == 0, max(P, N), 0)
        x = _convolved(xBC, conv_ptr, conv_bias_ptr, ring_ptr, g * P, p, P, shares, head, C, K, R, BLOCK_K)
        B = _convolved(xBC, conv_ptr, conv_bias_ptr, ring_ptr, G * P + g * N, n, N, shares, head, C, K, R, BLOCK_K)
        Cs = _convolved(xBC, conv_ptr, conv_bias_ptr, ring_ptr, G * P + G * N + h * N, n, N, N, head, C, K, R, BLOCK_K)
        dt = tl.load(xBC + C + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
        delta = softplus(dt)
        s = tl.exp(tl.load(A_ptr + h).to(tl.float32) * delta) * s + (delta * x)[:, None] * B[None, :]
        if RAGGED:
            tl.store(tile, s, mask=here)
        else:
            tl.store(tile, s)
        y = tl.sum(s * Cs[None, :], 1) + tl.load(D_ptr + h).to(tl.float32) * x
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        z = z.to(tl.float32)
        gated = y * (z * tl.sigmoid(z))
        normed = gated * tl.rsqrt(tl.sum(gated * gated, 0) / P + eps)
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
        weight = tl.load(norm_ptr + h * P + p, mask=p < P, other=0.0).to(tl.float32)
        tl.store(out, (weight * normed).to(out_ptr.dtype.element_ty), mask=p < P)
    else:
        tl.store(out, tl.zeros((BLOCK_P,), out_ptr.dtype.element_ty), mask=p < P)


@triton.jit
def _convolved(
    new_ptr, conv_ptr, bias_ptr, ring_ptr, first, i, size: tl.constexpr, writes, head,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution of channels ``first + i``; puts their new inputs into the ring where i < ``writes``.

    Taps are an axis of a tile and summed over: as a vector, every thread would load and convolve all the channels that
    its entries of the state meet.
    """
    c, k = first + i, tl.arange(0, BLOCK_K)
    tile, here = c[:, None], (i < size)[:, None] & (k < K)[None, :]
    past = ring_ptr + ((head + k - (K - 1)) & (R - 1))[None, :] * C + tile
    values = tl.load(tl.where((k < K - 1)[None, :], past, new_ptr + tile), mask=here, other=0.0).to(tl.float32)
    taps = tl.load(conv_ptr + tile * K + k[None, :], mask=here, other=0.0).to(tl.float32)
    total = tl.sum(values * taps, 1)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=i < size, other=0.0).to(tl.float32)
    new = tl.load(new_ptr + c, mask=i < size, other=0.0)
    tl.store(ring_ptr + (head & (R - 1)) * C + c, new, mask=(i < size) & (i < writes))
    return (total * tl.sigmoid(total)).to(new.dtype).to(tl.float32)
