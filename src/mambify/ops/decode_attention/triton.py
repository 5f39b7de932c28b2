"""One-query attention as a Triton kernel: a program is one row and one key/value head with all its query heads.

Keys and values are read once, however many query heads share them, and only as far as the row has come. The running
maximum and sum of the softmax are kept in float32.

Letters: S rows, H = G·R query heads, G key/value heads, P head dimension, L length of the buffers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


def decode_attention(
    q_SHP: Tensor, keys_SGLP: Tensor, values_SGLP: Tensor, lengths_S: Tensor, scaling: float, window: int | None
) -> Tensor:
    """See :func:`mambify.ops.decode_attention.decode_attention`."""
    slots, heads, head_dim = q_SHP.shape
    groups = keys_SGLP.shape[1]
    q_SHP = q_SHP.contiguous()
    if keys_SGLP.stride(-1) != 1 or values_SGLP.stride() != keys_SGLP.stride():
        raise ValueError("decode_attention: keys and values must have the same strides, P the innermost")
    out_SHP = torch.empty_like(q_SHP)
    shared = heads // groups
    _attend[(slots, groups)](
        q_SHP,
        keys_SGLP,
        values_SGLP,
        lengths_S,
        out_SHP,
        scaling * _LOG2E,
        window or 0,
        keys_SGLP.stride(0),
        keys_SGLP.stride(1),
        keys_SGLP.stride(2),
        R=shared,
        P=head_dim,
        G=groups,
        ROWS=max(16, triton.next_power_of_2(shared)),  # the least a matrix product takes
        WIDTH=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=64 if head_dim <= 64 else 32,  # larger ones do not fit the registers
        PRECISION="ieee" if q_SHP.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
    )
    return out_SHP


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, scale_log2, window, stride_s, stride_g, stride_l,
    R: tl.constexpr, P: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    first = 0
    if window > 0:
        first = tl.maximum(length - window, 0)
    r, p, s = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    heads = ((row * G + group) * R + r)[:, None] * P + p[None, :]
    here = (r < R)[:, None] & (p < P)[None, :]
    q = tl.load(q_ptr + heads, mask=here, other=0.0)
    base = row * stride_s + group * stride_g
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first // BLOCK * BLOCK, length, BLOCK):
        place = start + s
        seen = (place >= first) & (place < length)
        there = base + place[:, None] * stride_l + p[None, :]
        known = seen[:, None] & (p < P)[None, :]
        k = tl.load(k_ptr + there, mask=known, other=0.0)
        v = tl.load(v_ptr + there, mask=known, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    tl.store(out_ptr + heads, acc / total[:, None], mask=here)
