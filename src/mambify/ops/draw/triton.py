"""Drawing a token as Triton kernels.

A row of up to 16,384 logits is one program's, which reads it twice. A single multiprocessor would walk along more of
them for longer than a launch takes: then the first kernel has a program for each 8192 logits, which says how much they
weigh beside the largest of them, and the second one a program for each row, which finds on these numbers the 8192
that hold the token, and reads only those. A row that is cut must be known as a whole first, and one program of the
first kernel walks along it.

Nothing is sorted. The k-th largest logit is found by bisection over the order of floating-point numbers (an integer key
per logit, 16 bits for bfloat16, 32 for float32): each step counts how many keys reach the middle. The threshold of
``top_p`` is found the same way, summing weights in place of counting. A row of 49,152 bfloat16 logits is 98 KB and
stays in the second-level cache between the passes.

Letters: S rows, V vocabulary, C chunks of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.draw.settings import Settings

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
CHUNK = 8192  # logits of a chunk, and those that a program looks at together
_ALONE = 2  # chunks of a row that one program is as quick with


def draw_tokens(
    logits_SV: Tensor,
    uniform_S: Tensor,
    settings: Settings,
    ids_V: Tensor | None,
    out_S: Tensor | None,
    copy_SV: Tensor | None,
) -> Tensor:
    """See :func:`mambify.ops.draw.draw_tokens`."""
    rows, vocabulary = logits_SV.shape
    token_S = torch.empty(rows, dtype=torch.int64, device=logits_SV.device) if out_S is None else out_S
    copied = 0 if copy_SV is None else copy_SV.stride(0)
    facts = {"V": vocabulary, "BITS": key_bits(logits_SV.dtype)}
    drawn = uniform_S, ids_V, token_S, copy_SV
    strides = logits_SV.stride(0), uniform_S.stride(0), token_S.stride(0), copied
    given = {"HAS_IDS": ids_V is not None, "COPIES": copy_SV is not None}
    if vocabulary <= _ALONE * CHUNK:
        whole = int(triton.next_power_of_2(vocabulary))
        _draw[(rows,)](
            logits_SV, *drawn, *settings, *strides, **facts, **given, BLOCK=whole, num_warps=warps_of(whole)
        )  # fmt: skip
        return token_S
    chunks = Chunks.empty((rows,), vocabulary, logits_SV.device)
    _weigh[(chunks.count, rows)](
        logits_SV, copy_SV, *settings, *chunks, strides[0], copied, **facts, COPIES=copy_SV is not None,
        BLOCK=CHUNK, num_warps=warps_of(CHUNK),
    )  # fmt: skip
    _choose[(rows,)](
        logits_SV, *drawn[:3], settings.temperature_S, settings.min_p_S, *chunks, *strides[:3], **facts,
        HAS_IDS=ids_V is not None, CHUNKS=chunks.count, BLOCK_C=chunks.padded, BLOCK=CHUNK, num_warps=warps_of(CHUNK),
    )  # fmt: skip
    return token_S


class Chunks(NamedTuple):
    """What is known of rows of logits by chunks of ``CHUNK``; x: the dimensions of rows.

    Attributes:
        top_xC: the largest logit.
        sum_xC: what the chunk weighs, the largest logit as 1: its own, or in a row that was cut the row's.
        first_xC: the first place of the largest logit, int32.
        least_x: the least key kept of the row, int32.
    """

    top_xC: Tensor
    sum_xC: Tensor
    first_xC: Tensor
    least_x: Tensor

    @classmethod
    def empty(cls, rows: tuple[int, ...], vocabulary: int, device: torch.device) -> Chunks:
        """Of rows of so many logits."""
        count = triton.cdiv(vocabulary, CHUNK)
        top_xC, sum_xC = (torch.empty(*rows, count, dtype=torch.float32, device=device) for _ in range(2))
        first_xC = torch.empty(*rows, count, dtype=torch.int32, device=device)
        return cls(top_xC, sum_xC, first_xC, torch.empty(rows, dtype=torch.int32, device=device))

    @property
    def count(self) -> int:  # type: ignore[override]
        """C."""
        return self.top_xC.shape[-1]

    @property
    def padded(self) -> int:
        """C as a power of two."""
        return int(triton.next_power_of_2(self.count))


def key_bits(dtype: torch.dtype) -> int:
    """Bits in which the order of the logits shows."""
    return 16 if dtype == torch.bfloat16 else 32


def warps_of(block: int) -> int:
    """16 logits a thread."""
    return max(1, block // 512)


@triton.jit
def _key(x, BITS: tl.constexpr):
    """An integer that orders as the float does; for bfloat16 the upper half of one says it all."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return key >> (32 - BITS)


@triton.jit
def _largest(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, x)
    return tl.max(top, 0)


@triton.jit
def _reaching(
    row_ptr, least, top, scale_log2, V: tl.constexpr, BITS: tl.constexpr, WEIGH: tl.constexpr, BLOCK: tl.constexpr
):
    """How many logits have a key of at least ``least``, or how much weight they have."""
    v = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        share = tl.full([BLOCK], 1.0, tl.float32)
        if WEIGH:
            share = tl.exp2((x - top) * scale_log2)
        total += tl.where((_key(x, BITS) >= least) & (start + v < V), share, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    row_ptr,
    needed,
    low,
    high,
    top,
    scale_log2,
    V: tl.constexpr,
    BITS: tl.constexpr,
    WEIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key that ``needed`` logits (or weight) reach; ``low`` is reached by enough, ``high`` is not."""
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = _reaching(row_ptr, middle.to(tl.int32), top, scale_log2, V, BITS, WEIGH, BLOCK) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def scale_of(temperature):
    """Of exponents; 1 / ln 2 where nothing is drawn."""
    return _LOG2E / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def is_cut(temperature, top_k, top_p, min_p, V: tl.constexpr):
    """Whether a row draws from less than all tokens."""
    return (temperature > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1.0) | (min_p > 0))


@triton.jit
def cut(
    row_ptr, temperature, top_k, top_p, min_p,
    V: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left of a row: the largest logit, the scale of exponents, the least key kept, the least weight kept.

    At temperature 0 only the logits that equal the largest are left; the first of them is meant.
    """
    top = _largest(row_ptr, V, BLOCK)
    high = _key(top, BITS).to(tl.int64) + 1  # keys span 32 bits, their differences 33
    low = tl.full([], -(2 ** (BITS - 1)), tl.int64)
    scale_log2 = scale_of(temperature)
    if temperature > 0:
        if (top_k > 0) & (top_k < V):
            low = _threshold(row_ptr, top_k.to(tl.float32), low, high, top, scale_log2, V, BITS, False, BLOCK)
        if top_p < 1.0:
            needed = top_p * _reaching(row_ptr, low.to(tl.int32), top, scale_log2, V, BITS, True, BLOCK)
            low = _threshold(row_ptr, needed, low, high, top, scale_log2, V, BITS, True, BLOCK)
    else:
        low = high - 1
    return top, scale_log2, low.to(tl.int32), tl.where(temperature > 0, min_p, 0.0)


@triton.jit
def weights_of(x, top, scale_log2, least, floor, BITS: tl.constexpr):
    """Weights of logits of a row that was cut: the likeliest 1, those cut off and minus infinity 0."""
    weight = tl.exp2((x - top) * scale_log2)
    return tl.where((_key(x, BITS) >= least) & (weight >= floor), weight, 0.0)


@triton.jit
def _load(row_ptr, v, V: tl.constexpr):
    return tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def weigh(
    row_ptr, chunk, temperature, top_k, top_p, min_p, top_ptr, sum_ptr, first_ptr, least_ptr,
    V: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is known of a chunk of a row; of a row that is cut the first program finds it out for all chunks."""
    v = tl.arange(0, BLOCK)
    lowest = tl.full([], -(2 ** (BITS - 1)), tl.int64).to(tl.int32)
    if is_cut(temperature, top_k, top_p, min_p, V):
        if chunk == 0:
            top, scale_log2, least, floor = cut(row_ptr, temperature, top_k, top_p, min_p, V, BITS, BLOCK)
            tl.store(least_ptr, least)
            for start in range(0, V, BLOCK):
                weight = weights_of(_load(row_ptr, start + v, V), top, scale_log2, least, floor, BITS)
                tl.store(top_ptr + start // BLOCK, top)
                tl.store(sum_ptr + start // BLOCK, tl.sum(weight, 0))
    else:
        x = _load(row_ptr, chunk * BLOCK + v, V)
        top = tl.max(x, 0)
        level = tl.where(top > float("-inf"), top, 0.0)  # of nothing but minus infinity nothing weighs anything
        weight = tl.exp2((x - level) * scale_of(temperature))
        tl.store(top_ptr + chunk, top)
        tl.store(sum_ptr + chunk, tl.sum(weight, 0))
        tl.store(first_ptr + chunk, tl.min(tl.where(x == top, chunk * BLOCK + v, V), 0))
        tl.store(least_ptr, lowest, mask=chunk == 0)


@triton.jit
def rescaled(tops, sums, top, temperature):
    """Weights of chunks beside their own largest logits as those beside the row's."""
    return sums * tl.exp2((tops - top) * scale_of(temperature))


@triton.jit
def likeliest(first_ptr, tops, c, V: tl.constexpr, CHUNKS: tl.constexpr):
    """The first of a row's largest logits; the last of all in a row of none that is a number."""
    firsts = tl.load(first_ptr + c, mask=c < CHUNKS, other=V)
    return tl.minimum(tl.min(tl.where(tops == tl.max(tops, 0), firsts, V), 0), V - 1)


@triton.jit
def first_passed(sums, target, index, before):
    """Where ``before`` and the running sum of ``sums`` pass ``target``; the last place with any weight where rounding
    leaves that beyond the end.

    Returns:
        The place, by ``index``, and the sum before it.
    """
    passed = (before + tl.cumsum(sums, 0) > target) & (sums > 0)
    found = tl.min(tl.where(passed, index, 2147483647), 0)
    last = tl.max(tl.where(sums > 0, index, 0), 0)
    found = tl.minimum(found, last)
    return found, before + tl.sum(tl.where(index < found, sums, 0.0), 0)


@triton.jit
def _draw(
    logits_ptr, uniform_ptr, ids_ptr, token_ptr, copy_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    logits_s, uniform_s, token_s, copy_s, V: tl.constexpr, BITS: tl.constexpr, HAS_IDS: tl.constexpr,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_s
    temperature = tl.load(temperature_ptr + row)
    top, scale_log2, least, floor = cut(
        row_ptr, temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row),
        V, BITS, BLOCK,
    )  # fmt: skip
    v = tl.arange(0, BLOCK)
    x = _load(row_ptr, v, V)
    if COPIES:
        tl.store(copy_ptr + row * copy_s + v, x.to(copy_ptr.dtype.element_ty), mask=v < V)
    weight = weights_of(x, top, scale_log2, least, floor, BITS)
    share = tl.load(uniform_ptr + row * uniform_s)
    target = tl.where(temperature > 0, share * tl.sum(weight, 0), -1.0)  # the first of the likeliest
    token, _ = first_passed(weight, target, v, tl.zeros([], tl.float32))
    token = token.to(tl.int64)
    if HAS_IDS:
        token = tl.load(ids_ptr + token)
    tl.store(token_ptr + row * token_s, token)


@triton.jit
def _weigh(
    logits_ptr, copy_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, top_ptr, sum_ptr, first_ptr, least_ptr,
    logits_s, copy_s, V: tl.constexpr, BITS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr, at = logits_ptr + row * logits_s, row * tl.num_programs(0)
    if COPIES:
        v = chunk * BLOCK + tl.arange(0, BLOCK)
        tl.store(copy_ptr + row * copy_s + v, tl.load(row_ptr + v, mask=v < V, other=0.0), mask=v < V)
    weigh(
        row_ptr, chunk, tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row),
        tl.load(min_p_ptr + row), top_ptr + at, sum_ptr + at, first_ptr + at, least_ptr + row, V, BITS, BLOCK,
    )  # fmt: skip


@triton.jit
def _choose(
    logits_ptr, uniform_ptr, ids_ptr, token_ptr, temperature_ptr, min_p_ptr, top_ptr, sum_ptr, first_ptr, least_ptr,
    logits_s, uniform_s, token_s, V: tl.constexpr, BITS: tl.constexpr, HAS_IDS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    c = tl.arange(0, BLOCK_C)
    tops = tl.load(top_ptr + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
    top = tl.max(tops, 0)
    if temperature > 0:
        sums = tl.load(sum_ptr + row * CHUNKS + c, mask=c < CHUNKS, other=0.0)
        sums = rescaled(tops, sums, top, temperature)
        target = tl.load(uniform_ptr + row * uniform_s) * tl.sum(sums, 0)
        chunk, before = first_passed(sums, target, c, tl.zeros([], tl.float32))
        v = chunk * BLOCK + tl.arange(0, BLOCK)
        least, floor = tl.load(least_ptr + row), tl.load(min_p_ptr + row)
        weight = weights_of(_load(logits_ptr + row * logits_s, v, V), top, scale_of(temperature), least, floor, BITS)
        token, _ = first_passed(weight, target, v, before)
    else:
        token = likeliest(first_ptr + row * CHUNKS, tops, c, V, CHUNKS)
    token = token.to(tl.int64)
    if HAS_IDS:
        token = tl.load(ids_ptr + token)
    tl.store(token_ptr + row * token_s, token)
