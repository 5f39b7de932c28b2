"""Drawing a token as a Triton kernel: one program a row, which reads the row's logits several times from cache.

Nothing is sorted. The k-th largest logit is found by bisection over the order of floating-point numbers (an integer key
per logit, 16 bits for bfloat16, 32 for float32): each step counts how many keys reach the middle. The threshold of
``top_p`` is found the same way, summing weights in place of counting. A row of 49,152 bfloat16 logits is 98 KB and
stays in the second-level cache between the passes.

Letters: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.draw.settings import Settings

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_BLOCK = 8192  # logits a program looks at together: a single row is waited for, so few passes of many


def draw_tokens(logits_SV: Tensor, uniform_S: Tensor, settings: Settings) -> Tensor:
    """See :func:`mambify.ops.draw.draw_tokens`."""
    rows, vocabulary = logits_SV.shape
    token_S = torch.empty(rows, dtype=torch.int64, device=logits_SV.device)
    _draw[(rows,)](
        logits_SV,
        uniform_S,
        token_S,
        *settings,
        logits_SV.stride(0),
        V=vocabulary,
        BITS=key_bits(logits_SV.dtype),
        BLOCK=block_of(vocabulary),
        num_warps=warps_of(vocabulary),
    )
    return token_S


def key_bits(dtype: torch.dtype) -> int:
    """Bits in which the order of the logits shows."""
    return 16 if dtype == torch.bfloat16 else 32


def block_of(vocabulary: int) -> int:
    """Logits a program looks at together."""
    return min(_BLOCK, int(triton.next_power_of_2(vocabulary)))


def warps_of(vocabulary: int) -> int:
    """16 logits a thread."""
    return max(1, block_of(vocabulary) // 512)


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
    scale_log2 = _LOG2E / tl.where(temperature > 0, temperature, 1.0)
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
def kept_weights(row_ptr, v, top, scale_log2, least, floor, V: tl.constexpr, BITS: tl.constexpr):
    """Weights of the tokens ``v`` of a row that was cut: the likeliest 1, those cut off and those past the end 0."""
    x = tl.load(row_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    weight = tl.exp2((x - top) * scale_log2)
    return tl.where((_key(x, BITS) >= least) & (v < V) & (weight >= floor), weight, 0.0)


@triton.jit
def _draw(
    logits_ptr, uniform_ptr, token_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, stride,
    V: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    top, scale_log2, least, floor = cut(
        row_ptr, temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row),
        V, BITS, BLOCK,
    )  # fmt: skip
    v = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        total += kept_weights(row_ptr, start + v, top, scale_log2, least, floor, V, BITS)
    # Where the running sum of what is kept passes its share of the whole; rounding may leave that beyond the end.
    target = tl.load(uniform_ptr + row) * tl.sum(total, 0)
    target = tl.where(temperature > 0, target, -1.0)  # the first of the likeliest
    before = tl.zeros([], tl.float32)
    found = tl.full([], V, tl.int32)
    last = tl.zeros([], tl.int32)
    for start in range(0, V, BLOCK):
        weight = kept_weights(row_ptr, start + v, top, scale_log2, least, floor, V, BITS)
        passed = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        found = tl.minimum(found, tl.min(tl.where(passed, start + v, V), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, start + v, 0), 0))
        before += tl.sum(weight, 0)
    tl.store(token_ptr + row, tl.where(found < V, found, last).to(tl.int64))
