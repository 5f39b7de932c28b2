"""Norms of heads, rotation and the writing of keys and values as a Triton kernel: a program is one head of one token.

Letters: S rows, T new tokens, H query heads, G key/value heads, P head dimension, J = P/2, L length of buffers.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.overlap import launch_options, wait_for_others


def rotate_kv(
    qkv_STE: Tensor,
    cos_LJ: Tensor,
    sin_LJ: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    q_norm_P: Tensor | None,
    k_norm_P: Tensor | None,
    eps: float,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.rotate_kv.rotate_kv`."""
    S, T, outputs = qkv_STE.shape
    G, P = keys_SGLP.shape[1], keys_SGLP.shape[3]
    H = outputs // P - 2 * G
    if qkv_STE.stride(2) != 1:
        qkv_STE = qkv_STE.contiguous()
    if keys_SGLP.stride(3) != 1 or values_SGLP.stride() != keys_SGLP.stride():
        raise ValueError("rotate_kv: keys and values must have the same strides, P the innermost")
    q_STHP = qkv_STE.new_empty(S, T, H, P)
    with torch.cuda.device_of(qkv_STE):  # Triton launches on the current device
        _rotate_kv[((H + 2 * G) * S * T,)](
            qkv_STE, cos_LJ, sin_LJ, q_norm_P, k_norm_P, lengths_S, q_STHP, keys_SGLP, values_SGLP, eps,
            *qkv_STE.stride()[:2], cos_LJ.stride(0), sin_LJ.stride(0), *keys_SGLP.stride()[:3],
            T=T, H=H, G=G, P=P, J=triton.next_power_of_2(P // 2), num_warps=1, **launch_options(overlap),
        )  # fmt: skip
    return q_STHP


@triton.jit
def _rotate_kv(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, lengths_ptr, q_ptr, k_ptr, v_ptr, eps,
    qkv_row, qkv_token, cos_row, sin_row, stride_s, stride_g, stride_l,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, J: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    head, token = tl.program_id(0) % (H + 2 * G), tl.program_id(0) // (H + 2 * G)
    slot, t = (token // T).to(tl.int64), token % T
    j = tl.arange(0, J)
    half: tl.constexpr = P // 2
    here = j < half
    place = tl.load(lengths_ptr + slot).to(tl.int64) + t
    source = qkv_ptr + slot * qkv_row + t * qkv_token + head * P + j
    first, second = tl.load(source, mask=here, other=0.0), tl.load(source + half, mask=here, other=0.0)
    if head >= H + G:
        _put(v_ptr + slot * stride_s + (head - H - G) * stride_g + place * stride_l + j, first, second, here, half)
    else:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if q_norm_ptr is not None:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / P + eps)
            norm_ptr = tl.where(head < H, q_norm_ptr, k_norm_ptr) + j
            a *= scale * tl.load(norm_ptr, mask=here, other=0.0).to(tl.float32)
            b *= scale * tl.load(norm_ptr + half, mask=here, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + place * cos_row + j, mask=here, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + place * sin_row + j, mask=here, other=0.0).to(tl.float32)
        if head < H:
            _put(q_ptr + (token.to(tl.int64) * H + head) * P + j, a * cos - b * sin, b * cos + a * sin, here, half)
        else:
            target = k_ptr + slot * stride_s + (head - H) * stride_g + place * stride_l + j
            _put(target, a * cos - b * sin, b * cos + a * sin, here, half)


@triton.jit
def _put(target_ptr, first, second, here, half: tl.constexpr):
    tl.store(target_ptr, first.to(target_ptr.dtype.element_ty), mask=here)
    tl.store(target_ptr + half, second.to(target_ptr.dtype.element_ty), mask=here)
