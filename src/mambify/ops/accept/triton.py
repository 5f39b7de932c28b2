"""Accepting drafted tokens as three Triton kernels, without probabilities but of the tokens that are asked for.

The first has a program for each chunk of a row of logits, of target and draft: how much it weighs
(:mod:`mambify.ops.draw.triton`). From these numbers it is a few steps to which tokens stand. The second has a program
for each chunk of words, which takes these steps, and finds how much the target has over the draft there at the first
token that does not stand. The third has one for each row, and reads the chunk that holds the token.

Letters: S rows, K drafted tokens, T = K + 1, V vocabulary, W words that the draft knows, C chunks, X = T + K rows of
logits, the target's before the draft's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.draw import triton as draw
from mambify.ops.draw.settings import Settings
from mambify.ops.draw.triton import first_passed, key_bits, likeliest, rescaled, scale_of, warps_of, weigh, weights_of


def accept_drafts(
    target_STV: Tensor,
    draft_SKW: Tensor | None,
    drafted_SK: Tensor,
    uniform_ST: Tensor,
    num_drafted_S: Tensor | None,
    columns_V: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.accept.accept_drafts`."""
    S, T, V = target_STV.shape
    device = target_STV.device
    draft = target_STV if draft_SKW is None else draft_SKW  # not read where there is none
    chunks = draw.Chunks.empty((S, T if draft_SKW is None else 2 * T - 1), V, device)
    over_SC = torch.empty(S, chunks.count, dtype=torch.float32, device=device)
    num_kept_S, refused_S, token_S = (torch.empty(S, dtype=torch.int64, device=device) for _ in range(3))
    drafted = drafted_SK, num_drafted_S
    strides = *target_STV.stride()[:2], *draft.stride()[:2]
    shape = {
        "K": T - 1, "V": V, "W": draft.shape[-1], "BITS": key_bits(target_STV.dtype), "BLOCK": draw.CHUNK,
        "num_warps": warps_of(draw.CHUNK),
    }  # fmt: skip
    counts = {"HAS_COUNTS": num_drafted_S is not None}
    facts = shape | {
        "HAS_DRAFT": draft_SKW is not None, "HAS_COLUMNS": columns_V is not None, "CHUNKS": chunks.count,
        "BLOCK_C": chunks.padded,
    }  # fmt: skip
    chosen = columns_V, uniform_ST, settings.temperature_S, settings.min_p_S, *chunks, over_SC, num_kept_S, refused_S
    grid = chunks.count, chunks.top_xC.shape[1], S
    _weigh[grid](target_STV, draft, *drafted, *settings, *chunks, *strides, *drafted_SK.stride(), **shape, **counts)
    numbers = uniform_ST.stride()
    _excess[(chunks.count, S)](
        target_STV, draft, *drafted, *chosen, *strides, *drafted_SK.stride(), *numbers,
        **facts, **counts, BLOCK_T=int(triton.next_power_of_2(T)),
    )  # fmt: skip
    _decide[(S,)](target_STV, draft, *chosen, token_S, *strides, *numbers, **facts)
    return num_kept_S, token_S


@triton.jit
def _weigh(
    target_ptr, draft_ptr, drafted_ptr, num_drafted_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    top_ptr, sum_ptr, first_ptr, least_ptr, target_s, target_t, draft_s, draft_k, drafted_s, drafted_k,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    chunk, x, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.where(x > K, x - K - 1, x)
    num_drafted = tl.full([], K, tl.int64)
    if HAS_COUNTS:
        num_drafted = tl.load(num_drafted_ptr + s)
    if tl.where(x > K, place >= num_drafted, place > num_drafted):
        return  # beyond what the row drafted
    temperature, top_k = tl.load(temperature_ptr + s), tl.load(top_k_ptr + s)
    top_p, min_p = tl.load(top_p_ptr + s), tl.load(min_p_ptr + s)
    row = s * tl.num_programs(1) + x
    at = row * tl.num_programs(0)
    if x > K:
        if chunk * BLOCK < W:
            weigh(
                draft_ptr + s * draft_s + place.to(tl.int64) * draft_k, chunk, temperature, top_k, top_p, min_p,
                top_ptr + at, sum_ptr + at, first_ptr + at, least_ptr + row, W, BITS, BLOCK,
            )  # fmt: skip
    else:
        weigh(
            target_ptr + s * target_s + place.to(tl.int64) * target_t, chunk, temperature, top_k, top_p, min_p,
            top_ptr + at, sum_ptr + at, first_ptr + at, least_ptr + row, V, BITS, BLOCK,
        )  # fmt: skip


@triton.jit
def _likely(
    x_T, row_T, asked_T, temperature, floor, top_ptr, sum_ptr, least_ptr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Probabilities of one token in each of several rows of ``WIDTH`` logits, given the tokens' logits."""
    c = tl.arange(0, BLOCK_C)
    at, here = row_T[:, None] * CHUNKS + c[None, :], asked_T[:, None] & (c * BLOCK < WIDTH)[None, :]
    tops = tl.load(top_ptr + at, mask=here, other=float("-inf"))
    sums = tl.load(sum_ptr + at, mask=here, other=0.0)
    top_T = tl.where(asked_T, tl.max(tops, 1), 0.0)
    total_T = tl.sum(rescaled(tops, sums, top_T[:, None], temperature), 1)
    least_T = tl.load(least_ptr + row_T, mask=asked_T, other=0)
    weight_T = weights_of(x_T, top_T, scale_of(temperature), least_T, floor, BITS)
    return weight_T / tl.where(asked_T, total_T, 1.0)


@triton.jit
def _standing(
    s, target_ptr, draft_ptr, drafted_ptr, num_drafted_ptr, columns_ptr, uniform_ptr, temperature, floor, top_ptr,
    sum_ptr, first_ptr, least_ptr, target_s, target_t, draft_s, draft_k, drafted_s, drafted_k, uniform_s, uniform_t,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_COUNTS: tl.constexpr, HAS_DRAFT: tl.constexpr, HAS_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """How many drafted tokens of a row stand, and the one that does not, or -1 where none is left."""
    X: tl.constexpr = 2 * K + 1 if HAS_DRAFT else K + 1
    t = tl.arange(0, BLOCK_T)
    num_drafted = tl.full([], K, tl.int32)
    if HAS_COUNTS:
        num_drafted = tl.load(num_drafted_ptr + s).to(tl.int32)
    asked = t < num_drafted
    token = tl.load(drafted_ptr + s * drafted_s + t.to(tl.int64) * drafted_k, mask=asked, other=0)
    if temperature > 0:
        x = tl.load(target_ptr + s * target_s + t.to(tl.int64) * target_t + token, mask=asked, other=0.0)
        p = _likely(
            x.to(tl.float32), s * X + t, asked, temperature, floor, top_ptr, sum_ptr, least_ptr, V, BITS, BLOCK,
            CHUNKS, BLOCK_C,
        )  # fmt: skip
        q = tl.full([BLOCK_T], 1.0, tl.float32)
        if HAS_DRAFT:
            column = token
            if HAS_COLUMNS:
                column = tl.load(columns_ptr + token, mask=asked, other=0).to(tl.int64)
            x = tl.load(
                draft_ptr + s * draft_s + t.to(tl.int64) * draft_k + column, mask=asked & (column >= 0),
                other=float("-inf"),
            )  # fmt: skip
            q = _likely(
                x.to(tl.float32), s * X + K + 1 + t, asked, temperature, floor, top_ptr, sum_ptr, least_ptr, W, BITS,
                BLOCK, CHUNKS, BLOCK_C,
            )  # fmt: skip
        number = tl.load(uniform_ptr + s * uniform_s + t * uniform_t, mask=asked, other=0.0)
        stands = asked & (number * q < p)
    else:
        c = tl.arange(0, BLOCK_C)
        at, here = (s * X + t)[:, None] * CHUNKS + c[None, :], asked[:, None] & (c < CHUNKS)[None, :]
        tops = tl.load(top_ptr + at, mask=here, other=float("-inf"))
        firsts = tl.load(first_ptr + at, mask=here, other=V)
        first = tl.min(tl.where(tops == tl.max(tops, 1)[:, None], firsts, V), 1)
        stands = asked & (token == first)
    num_kept = tl.min(tl.where(stands, BLOCK_T, t), 0)
    num_kept = tl.minimum(num_kept, num_drafted)
    refused = tl.where(num_kept < num_drafted, tl.sum(tl.where(t == num_kept, token, 0), 0), -1)
    return num_kept, refused


@triton.jit
def _row_of(
    row, top_ptr, sum_ptr, temperature, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest logit of a row and what the row weighs."""
    c = tl.arange(0, BLOCK_C)
    tops = tl.load(top_ptr + row * CHUNKS + c, mask=c * BLOCK < WIDTH, other=float("-inf"))
    sums = tl.load(sum_ptr + row * CHUNKS + c, mask=c * BLOCK < WIDTH, other=0.0)
    top = tl.max(tops, 0)
    return top, tl.sum(rescaled(tops, sums, top, temperature), 0)


@triton.jit
def _over(
    s, chunk, num_kept, refused, target_ptr, draft_ptr, columns_ptr, temperature, floor, top_ptr, sum_ptr, least_ptr,
    target_s, target_t, draft_s, draft_k, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_DRAFT: tl.constexpr, HAS_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the target has over the draft in a chunk, at a refused token; all it has where none was refused."""
    X: tl.constexpr = 2 * K + 1 if HAS_DRAFT else K + 1
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    row = s * X + num_kept
    top, total = _row_of(row, top_ptr, sum_ptr, temperature, V, BLOCK, CHUNKS, BLOCK_C)
    x = tl.load(target_ptr + s * target_s + num_kept.to(tl.int64) * target_t + v, mask=v < V, other=float("-inf"))
    scale = scale_of(temperature)
    over = weights_of(x.to(tl.float32), top, scale, tl.load(least_ptr + row), floor, BITS) / total
    if HAS_DRAFT:
        if refused >= 0:
            row = s * X + K + 1 + num_kept
            top, total = _row_of(row, top_ptr, sum_ptr, temperature, W, BLOCK, CHUNKS, BLOCK_C)
            column = v
            if HAS_COLUMNS:
                column = tl.load(columns_ptr + v, mask=v < V, other=-1).to(tl.int32)
            x = tl.load(
                draft_ptr + s * draft_s + num_kept.to(tl.int64) * draft_k + column, mask=(column >= 0) & (v < V),
                other=float("-inf"),
            )  # fmt: skip
            weight = weights_of(x.to(tl.float32), top, scale, tl.load(least_ptr + row), floor, BITS)
            over = tl.maximum(over - weight / total, 0.0)
    else:
        over = tl.where(v == refused, 0.0, over)
    return over


@triton.jit
def _excess(
    target_ptr, draft_ptr, drafted_ptr, num_drafted_ptr, columns_ptr, uniform_ptr, temperature_ptr, min_p_ptr,
    top_ptr, sum_ptr, first_ptr, least_ptr, over_ptr, num_kept_ptr, refused_ptr, target_s, target_t, draft_s, draft_k,
    drafted_s, drafted_k, uniform_s, uniform_t, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_COUNTS: tl.constexpr, HAS_DRAFT: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    chunk, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, floor = tl.load(temperature_ptr + s), tl.load(min_p_ptr + s)
    if (temperature <= 0) & (chunk > 0):
        return  # nothing will be drawn
    num_kept, refused = _standing(
        s, target_ptr, draft_ptr, drafted_ptr, num_drafted_ptr, columns_ptr, uniform_ptr, temperature, floor, top_ptr,
        sum_ptr, first_ptr, least_ptr, target_s, target_t, draft_s, draft_k, drafted_s, drafted_k, uniform_s,
        uniform_t, K, V, W, BITS, BLOCK, HAS_COUNTS, HAS_DRAFT, HAS_COLUMNS, CHUNKS, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    tl.store(num_kept_ptr + s, num_kept.to(tl.int64), mask=chunk == 0)
    tl.store(refused_ptr + s, refused.to(tl.int64), mask=chunk == 0)
    if temperature > 0:
        over = _over(
            s, chunk, num_kept, refused, target_ptr, draft_ptr, columns_ptr, temperature, floor, top_ptr, sum_ptr,
            least_ptr, target_s, target_t, draft_s, draft_k, K, V, W, BITS, BLOCK, HAS_DRAFT, HAS_COLUMNS, CHUNKS,
            BLOCK_C,
        )  # fmt: skip
        tl.store(over_ptr + s * CHUNKS + chunk, tl.sum(over, 0))


@triton.jit
def _decide(
    target_ptr, draft_ptr, columns_ptr, uniform_ptr, temperature_ptr, min_p_ptr, top_ptr, sum_ptr, first_ptr,
    least_ptr, over_ptr, num_kept_ptr, refused_ptr, token_ptr, target_s, target_t, draft_s, draft_k, uniform_s,
    uniform_t, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DRAFT: tl.constexpr, HAS_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    X: tl.constexpr = 2 * K + 1 if HAS_DRAFT else K + 1
    temperature, floor = tl.load(temperature_ptr + s), tl.load(min_p_ptr + s)
    num_kept, refused = tl.load(num_kept_ptr + s), tl.load(refused_ptr + s)
    c = tl.arange(0, BLOCK_C)
    if temperature > 0:
        sums = tl.load(over_ptr + s * CHUNKS + c, mask=c < CHUNKS, other=0.0)
        total = tl.sum(sums, 0)
        target = tl.load(uniform_ptr + s * uniform_s + K * uniform_t) * total
        chunk, before = first_passed(sums, target, c, tl.zeros([], tl.float32))
        over = _over(
            s, chunk, num_kept, refused, target_ptr, draft_ptr, columns_ptr, temperature, floor, top_ptr, sum_ptr,
            least_ptr, target_s, target_t, draft_s, draft_k, K, V, W, BITS, BLOCK, HAS_DRAFT, HAS_COLUMNS, CHUNKS,
            BLOCK_C,
        )  # fmt: skip
        token, _ = first_passed(over, target, chunk * BLOCK + tl.arange(0, BLOCK), before)
        # p = q but for rounding, which alone can have refused the token: it is as good as any draw from p. Where
        # logits are no numbers nothing may have been refused; the token is one of the vocabulary all the same.
        token = tl.where(total > 0, token.to(tl.int64), tl.maximum(refused, 0))
    else:
        row = s * X + num_kept
        tops = tl.load(top_ptr + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        token = likeliest(first_ptr + row * CHUNKS, tops, c, V, CHUNKS).to(tl.int64)
    tl.store(token_ptr + s, token)
