"""Attention of a few queries a row as Triton kernels: a program is one row, one key/value head with all its query
heads, and one part of what the row holds.

Keys and values are read once, however many query heads and queries share them, and only as far as the row has come.
The running maximum and sum of the softmax are kept in float32. With few rows each one is divided among several
programs, whose results are put together (Dao et al., "Flash-Decoding", 2023) by a second kernel, or of few parts by the
program that comes last. How many there are depends on the shapes alone, so that a recorded step serves rows of any
length.

Letters: S rows, T queries, H = G·R query heads, G key/value heads, P head dimension, L length of the buffers, N parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.overlap import launch_options, wait_for_others

_LOG2E = 1.4426950408889634
_PROGRAMS = 2 * 132  # that keep an H100 busy
_LEAST = 256  # entries of a part, below which dividing costs more than it gains
_FEW = 4  # parts up to which one program puts them together sooner than another kernel begins; a guess


def decode_attention(
    q_STHP: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    scaling: float,
    window: int | None,
    more: int,
    counts_X: Tensor | None,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.decode_attention.decode_attention`."""
    slots, queries, heads, head_dim = q_STHP.shape
    groups, length = keys_SGLP.shape[1:3]
    q_STHP = q_STHP.contiguous()
    if keys_SGLP.stride(-1) != 1 or values_SGLP.stride() != keys_SGLP.stride():
        raise ValueError("decode_attention: keys and values must have the same strides, P the innermost")
    out_STHP = torch.empty_like(q_STHP)
    shared = heads // groups
    rows = max(16, triton.next_power_of_2(queries * shared))  # the least a matrix product takes
    parts = max(1, min(_PROGRAMS // (slots * groups), triton.cdiv(length if window is None else window, _LEAST)))
    shape = {"T": queries, "R": shared, "P": head_dim, "G": groups, "ROWS": rows, "PARTS": parts}
    width = max(16, triton.next_power_of_2(head_dim))
    partial, sums = out_STHP, lengths_S  # not touched where there is one part
    at_once = counts_X is not None and 1 < parts <= _FEW
    if parts > 1:
        partial = q_STHP.new_empty((slots, groups, parts, rows, head_dim), dtype=torch.float32)
        sums = q_STHP.new_empty((slots, groups, parts, 2, rows), dtype=torch.float32)
    _attend[(slots, groups, parts)](
        q_STHP,
        keys_SGLP,
        values_SGLP,
        lengths_S,
        out_STHP,
        partial,
        sums,
        counts_X,
        scaling * _LOG2E,
        window or 0,
        keys_SGLP.stride(0),
        keys_SGLP.stride(1),
        keys_SGLP.stride(2),
        **shape,
        MORE=more,
        AT_ONCE=at_once,
        MOST=triton.next_power_of_2(parts),
        WIDTH=width,
        BLOCK=64 if head_dim <= 64 and rows <= 32 else 32,  # larger ones do not fit the registers
        PRECISION="ieee" if q_STHP.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
        **launch_options(overlap),
    )
    if parts > 1 and not at_once:
        _combine[(slots, groups, queries * shared)](
            partial,
            sums,
            out_STHP,
            **shape,
            WIDTH=width,
            TOGETHER=min(64, triton.next_power_of_2(parts)),
            num_warps=4,
            **launch_options(overlap),
        )
    return out_STHP


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, partial_ptr, sums_ptr, counts_ptr, scale_log2, window,
    stride_s, stride_g, stride_l, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, MORE: tl.constexpr, AT_ONCE: tl.constexpr, MOST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    slot, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + slot).to(tl.int32) + MORE
    n, p, s = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    end = length - T + 1 + n // R  # of what each query sees
    first = 0
    begin = tl.zeros_like(end)
    if window > 0:
        begin = tl.maximum(end - window, 0)
        first = tl.maximum(length - T + 1 - window, 0)
    heads = _places(slot, group, n, p, T, R, P, G)
    here = (n < T * R)[:, None] & (p < P)[None, :]
    q = tl.load(q_ptr + heads, mask=here, other=0.0)
    base = slot * stride_s + group * stride_g
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    lowest = first // BLOCK * BLOCK
    each = tl.cdiv(tl.cdiv(length - lowest, PARTS), BLOCK) * BLOCK
    low = lowest + part * each
    for start in range(low, tl.minimum(low + each, length), BLOCK):
        place = start + s
        there = base + place[:, None].to(tl.int64) * stride_l + p[None, :]
        known = ((place >= first) & (place < length))[:, None] & (p < P)[None, :]
        k = tl.load(k_ptr + there, mask=known, other=0.0)
        v = tl.load(v_ptr + there, mask=known, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        seen = (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen nothing yet
        weight = tl.exp2(scores - level[:, None])
        fade = tl.exp2(top - level)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    if PARTS == 1:
        total = tl.where(total > 0, total, 1.0)  # rows that stand for no query
        tl.store(out_ptr + heads, acc / total[:, None], mask=here)
    else:
        place = ((slot * G + group) * PARTS + part) * ROWS
        tl.store(partial_ptr + (place + n)[:, None] * P + p[None, :], acc, mask=here)
        tl.store(sums_ptr + 2 * place + n, top, mask=n < T * R)
        tl.store(sums_ptr + 2 * place + ROWS + n, total, mask=n < T * R)
        if AT_ONCE:  # whoever comes last has all parts before it
            tl.debug_barrier()
            if tl.atomic_add(counts_ptr + slot * G + group, 1, sem="acq_rel") == PARTS - 1:
                tl.store(counts_ptr + slot * G + group, 0)
                first_part = (slot * G + group) * PARTS
                acc = _together(partial_ptr, sums_ptr, first_part, n, p, T, R, P, ROWS, PARTS, MOST, WIDTH)
                tl.store(out_ptr + heads, acc, mask=here)


@triton.jit
def _together(
    partial_ptr, sums_ptr, first_part, n, p, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All queries of one row and key/value head: the parts, each weighted by what it stands for."""
    part = tl.arange(0, MOST)
    at = 2 * (first_part + part)[:, None] * ROWS + n[None, :]
    known = (part < PARTS)[:, None] & (n < T * R)[None, :]
    tops = tl.load(sums_ptr + at, mask=known, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(sums_ptr + at + ROWS, mask=known, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    level = tl.where(top == float("-inf"), 0.0, top)  # rows that stand for no query
    total = tl.sum(sums * tl.exp2(tops - level[None, :]), 0)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    here = (n < T * R)[:, None] & (p < P)[None, :]
    for k in tl.static_range(PARTS):
        place = (first_part + k) * ROWS
        k_top = tl.load(sums_ptr + 2 * place + n, mask=n < T * R, other=0.0, cache_modifier=".cg")
        there = (place + n)[:, None] * P + p[None, :]
        values = tl.load(partial_ptr + there, mask=here, other=0.0, cache_modifier=".cg")
        acc += tl.exp2(k_top - level)[:, None] * values
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _combine(
    partial_ptr, sums_ptr, out_ptr,
    T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, TOGETHER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query of one row and key/value head: the parts, each weighted by what it stands for."""
    wait_for_others(OVERLAP)
    slot, group, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    p, m = tl.arange(0, WIDTH), tl.arange(0, TOGETHER)  # of so many parts all loads are under way at once
    first = (slot * G + group) * PARTS
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for start in range(0, PARTS, TOGETHER):
        part = start + m
        place = (first + part) * ROWS
        tops = tl.load(sums_ptr + 2 * place + n, mask=part < PARTS, other=float("-inf"))
        sums = tl.load(sums_ptr + 2 * place + ROWS + n, mask=part < PARTS, other=0.0)
        here = (part < PARTS)[:, None] & (p < P)[None, :]
        values = tl.load(partial_ptr + (place + n)[:, None] * P + p[None, :], mask=here, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # parts beyond what the row holds
        share, fade = tl.exp2(tops - level), tl.exp2(top - level)
        total = total * fade + tl.sum(share * sums, 0)
        acc = acc * fade + tl.sum(share[:, None] * values, 0)
        top = higher
    out = _places(slot, group, n + tl.zeros([1], tl.int32), p, T, R, P, G)
    tl.store(out_ptr + out, (acc / total)[None, :], mask=(p < P)[None, :])


@triton.jit
def _places(slot, group, n, p, T: tl.constexpr, R: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """Offsets ``[ROWS, WIDTH]`` of a key/value head's queries in ``[S, T, H, P]``; n is token n // R, head n % R."""
    return (((slot * T + n // R) * G + group) * R + n % R)[:, None] * P + p[None, :]
