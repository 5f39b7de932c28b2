"""Accepting drafted tokens as two Triton kernels, without the probabilities of any token but those that are asked for.

The first has a program for each row and position of target and draft: where the row is cut, what is left weighs, and
how likely the drafted token is. The second has a program for each row: it walks along the drafted tokens on these
numbers alone and draws one token at the end, which reads two rows of logits twice.

Letters: S rows, K drafted tokens, T = K + 1, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.draw.settings import Settings
from mambify.ops.draw.triton import block_of, cut, kept_weights, key_bits, warps_of

#: numbers kept of a row of logits: the largest, the scale of exponents, the least weight kept, the sum of weights, the
#: probability of the drafted token
_FACTS: tl.constexpr = tl.constexpr(5)


def accept_drafts(
    target_STV: Tensor,
    draft_SKV: Tensor | None,
    drafted_SK: Tensor,
    uniform_ST: Tensor,
    num_drafted_S: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.accept.accept_drafts`."""
    S, T, V = target_STV.shape
    K = T - 1
    positions = T if draft_SKV is None else T + K
    device = target_STV.device
    facts = torch.empty(S, positions, 5, dtype=torch.float32, device=device)
    least = torch.empty(S, positions, dtype=torch.int32, device=device)
    num_kept_S, token_S = (torch.empty(S, dtype=torch.int64, device=device) for _ in range(2))
    draft = target_STV if draft_SKV is None else draft_SKV  # not read where there is none
    strides = (*target_STV.stride()[:2], *draft.stride()[:2], *drafted_SK.stride())
    shape = {"K": K, "V": V, "BITS": key_bits(target_STV.dtype), "BLOCK": block_of(V), "num_warps": warps_of(V)}
    _measure[(positions, S)](
        target_STV, draft, drafted_SK, num_drafted_S, *settings, facts, least, *strides, **shape
    )  # fmt: skip
    _decide[(S,)](
        target_STV, draft, drafted_SK, uniform_ST, num_drafted_S, facts, least, num_kept_S, token_S,
        settings.temperature_S, *strides, *uniform_ST.stride(), HAS_DRAFT=draft_SKV is not None, **shape,
    )  # fmt: skip
    return num_kept_S, token_S


@triton.jit
def _row(target_ptr, draft_ptr, row, position, target_s, target_t, draft_s, draft_k, K: tl.constexpr):
    """The logits of a position: of the target up to K, of the draft from K + 1 on."""
    if position > K:
        row_ptr = draft_ptr + row * draft_s + (position - K - 1).to(tl.int64) * draft_k
    else:
        row_ptr = target_ptr + row * target_s + position.to(tl.int64) * target_t
    return row_ptr


@triton.jit
def _measure(
    target_ptr, draft_ptr, drafted_ptr, num_drafted_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    facts_ptr, least_ptr, target_s, target_t, draft_s, draft_k, drafted_s, drafted_k,
    K: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = tl.where(position > K, position - K - 1, position)
    num_drafted = tl.load(num_drafted_ptr + row)
    if tl.where(position > K, place >= num_drafted, place > num_drafted):
        return  # beyond what the row drafted
    row_ptr = _row(target_ptr, draft_ptr, row, position, target_s, target_t, draft_s, draft_k, K)
    temperature = tl.load(temperature_ptr + row)
    top, scale_log2, least, floor = cut(
        row_ptr, temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row),
        V, BITS, BLOCK,
    )  # fmt: skip
    v = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    first = tl.full([], V, tl.int32)
    for start in range(0, V, BLOCK):
        weight = kept_weights(row_ptr, start + v, top, scale_log2, least, floor, V, BITS)
        sums += weight
        first = tl.minimum(first, tl.min(tl.where(weight > 0, start + v, V), 0))
    total = tl.sum(sums, 0)

    inside = place < num_drafted  # the last of the target's has no drafted token
    token = tl.load(drafted_ptr + row * drafted_s + place.to(tl.int64) * drafted_k, mask=inside, other=0).to(tl.int32)
    weight = kept_weights(row_ptr, token + tl.zeros([1], tl.int32), top, scale_log2, least, floor, V, BITS)
    likely = tl.sum(weight, 0) / total
    likely = tl.where(temperature > 0, likely, tl.where(token == first, 1.0, 0.0))
    out = facts_ptr + (row * tl.num_programs(0) + position) * _FACTS
    tl.store(out, top)
    tl.store(out + 1, scale_log2)
    tl.store(out + 2, floor)
    tl.store(out + 3, total)
    tl.store(out + 4, likely)
    # At temperature 0 all that is needed later is the likeliest token itself.
    tl.store(least_ptr + row * tl.num_programs(0) + position, tl.where(temperature > 0, least, first))


@triton.jit
def _probability(row_ptr, v, facts, least, V: tl.constexpr, BITS: tl.constexpr):
    weight = kept_weights(row_ptr, v, tl.load(facts), tl.load(facts + 1), least, tl.load(facts + 2), V, BITS)
    return weight / tl.load(facts + 3)


@triton.jit
def _over(
    p_ptr, q_ptr, v, p_facts, p_least, q_facts, q_least, refused, V: tl.constexpr, BITS: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
):  # fmt: skip
    """What the target has over the draft at a refused token; all it has where none was refused (``refused`` < 0)."""
    over = _probability(p_ptr, v, p_facts, p_least, V, BITS)
    if HAS_DRAFT:
        if refused >= 0:
            over = tl.maximum(over - _probability(q_ptr, v, q_facts, q_least, V, BITS), 0.0)
    else:
        over = tl.where(v == refused, 0.0, over)
    return over


@triton.jit
def _decide(
    target_ptr, draft_ptr, drafted_ptr, uniform_ptr, num_drafted_ptr, facts_ptr, least_ptr, num_kept_ptr, token_ptr,
    temperature_ptr, target_s, target_t, draft_s, draft_k, drafted_s, drafted_k, uniform_s, uniform_t,
    K: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, HAS_DRAFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    POSITIONS: tl.constexpr = 2 * K + 1 if HAS_DRAFT else K + 1
    facts_ptr += row * POSITIONS * _FACTS
    least_ptr += row * POSITIONS
    num_drafted = tl.load(num_drafted_ptr + row).to(tl.int32)
    num_kept = tl.zeros([], tl.int32)
    for k in range(K):
        p = tl.load(facts_ptr + k * _FACTS + 4)
        q = tl.full([], 1.0, tl.float32)
        if HAS_DRAFT:
            q = tl.load(facts_ptr + (K + 1 + k) * _FACTS + 4)
        number = tl.load(uniform_ptr + row * uniform_s + k * uniform_t)
        kept = (k < num_drafted) & (num_kept == k) & (number * q < p)
        num_kept += kept.to(tl.int32)
    tl.store(num_kept_ptr + row, num_kept.to(tl.int64))

    refused = tl.full([], -1, tl.int32)
    if num_kept < num_drafted:
        refused = tl.load(drafted_ptr + row * drafted_s + num_kept.to(tl.int64) * drafted_k).to(tl.int32)
    p_place = num_kept
    q_place = tl.where(HAS_DRAFT and refused >= 0, num_kept + K + 1, num_kept)  # not looked at where none is refused
    p_ptr = _row(target_ptr, draft_ptr, row, p_place, target_s, target_t, draft_s, draft_k, K)
    q_ptr = _row(target_ptr, draft_ptr, row, q_place, target_s, target_t, draft_s, draft_k, K)
    p_facts, q_facts = facts_ptr + p_place * _FACTS, facts_ptr + q_place * _FACTS
    p_least, q_least = tl.load(least_ptr + p_place), tl.load(least_ptr + q_place)
    if tl.load(temperature_ptr + row) > 0:
        v = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            sums += _over(p_ptr, q_ptr, start + v, p_facts, p_least, q_facts, q_least, refused, V, BITS, HAS_DRAFT)
        total = tl.sum(sums, 0)
        target = tl.load(uniform_ptr + row * uniform_s + K * uniform_t) * total
        before = tl.zeros([], tl.float32)
        found = tl.full([], V, tl.int32)
        last = tl.zeros([], tl.int32)
        for start in range(0, V, BLOCK):
            over = _over(p_ptr, q_ptr, start + v, p_facts, p_least, q_facts, q_least, refused, V, BITS, HAS_DRAFT)
            passed = (before + tl.cumsum(over, 0) > target) & (over > 0)
            found = tl.minimum(found, tl.min(tl.where(passed, start + v, V), 0))
            last = tl.maximum(last, tl.max(tl.where(over > 0, start + v, 0), 0))
            before += tl.sum(over, 0)
        token = tl.where(found < V, found, last)
        # p = q but for rounding, which alone can have refused the token: it is as good as any draw from p.
        token = tl.where(total > 0, token, refused)
    else:
        token = p_least
    tl.store(token_ptr + row, token.to(tl.int64))
