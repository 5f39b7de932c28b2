"""What a chunk of logits contributes to the loss, as one Triton kernel: one program a position.

The program reads its row of student and teacher logits once for all sums and once more for the gradient, which takes
the place of the student's logits where the dtypes allow. In bytes a position, for logits of b bytes (2 in bfloat16) and
a gradient of 2: the products with the heads write 2bV, the sums read 2bV, the gradient reads 2bV and writes 2V, and its
product with the head reads 2V. In bfloat16 that is 16V, 0.8 MB at V = 49,152, of which up to 4V come from the
second-level cache: the second reading goes backwards, to meet first what was read last. The gradient of the total
variation needs one sum more, of what depends on both softmaxes: another reading of 2bV, backwards, after which the
gradient's goes forwards.

Letters: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.linear_kl.reference import Objective

_LOG2E = 1.4426950408889634
# Every thread keeps sums of its own for each of its columns: 8 columns (16 bytes of bfloat16) make about 100 registers,
# which leaves room for two programs on a multiprocessor. More programs would read more rows than the cache can hold.
_WARPS, _COLUMNS_A_THREAD = 8, 8


def loss_of_logits(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    objective: Objective,
    *,
    difference: bool,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`mambify.ops.linear_kl.reference.loss_of_logits`. Rows may lie any distance apart, columns may not.

    A label that is neither ignored nor in the vocabulary makes the cross-entropy NaN.
    """
    positions, vocabulary = student_CV.shape
    device = student_CV.device
    rows_C = torch.empty(objective.num_rows, positions, dtype=torch.float32, device=device)
    grad_CV = student_CV
    if gradient not in (None, student_CV.dtype):
        grad_CV = torch.empty_strided(student_CV.shape, student_CV.stride(), dtype=gradient, device=device)
    two_softmaxes = objective.ce_weight != 0 and objective.temperature != 1
    columns = _COLUMNS_A_THREAD // 2 if two_softmaxes else _COLUMNS_A_THREAD
    block = min(32 * _WARPS * columns, triton.next_power_of_2(vocabulary))
    _loss_of_logits[(positions,)](
        student_CV,
        teacher_CV,
        grad_CV,
        labels_C,
        rows_C,
        student_CV.stride(0),
        teacher_CV.stride(0),
        grad_CV.stride(0),
        labels_C.stride(0),
        positions,
        objective.kl_weight,
        objective.reverse_kl_weight,
        objective.ce_weight,
        objective.tv_weight,
        objective.temperature,
        IGNORE=objective.ignore_index,
        V=vocabulary,
        DIFFERENCE=difference,
        REVERSE=objective.reverse_kl_weight != 0,
        CE=objective.ce_weight != 0,
        TV=objective.tv_weight != 0,
        TEMPERED=objective.temperature != 1,
        GRADIENT=gradient is not None,
        LOG2E=_LOG2E,
        BLOCK=block,
        num_warps=max(block // (32 * columns), 1),
        maxnreg=128,  # a vocabulary that is no multiple of the block would take more, for its last block alone
    )
    return rows_C, grad_CV if gradient is not None else None


@triton.jit
def _load(
    student_ptr, teacher_ptr, block, V: tl.constexpr, DIFFERENCE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of student and teacher logits, and student minus teacher."""
    v = block * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        student = tl.load(student_ptr + v, mask=v < V, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    else:
        student = tl.load(student_ptr + v).to(tl.float32)
        teacher = tl.load(teacher_ptr + v).to(tl.float32)
    gap = student
    if DIFFERENCE:
        student += teacher
    else:
        gap -= teacher
    if MASKED:  # below every logit, but finite: no infinity is subtracted from another
        student = tl.where(v < V, student, -1e38)
        teacher = tl.where(v < V, teacher, -1e38)
    return student, teacher, gap


@triton.jit
def meet(x, top, minus_scale):
    """Factors for what a lane has summed so far and for the new term, both relative to the larger of ``top`` and ``x``.

    One of the two is 1, so that one exponential does for both.
    """
    larger = x > top
    factor = tl.exp2(tl.abs(x - top) * minus_scale)
    return tl.where(larger, factor, 1.0), tl.where(larger, 1.0, factor)


@triton.jit
def _add_block(
    sums, student_ptr, teacher_ptr, block, minus_scale, V: tl.constexpr, DIFFERENCE: tl.constexpr,
    REVERSE: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr, LOG2E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a block to the sums. Every lane keeps its own, relative to the largest logit that it has seen."""
    t_top, t_sum, t_at, t_gap_sum, s_top, s_sum, s_at, s_gap_sum, s_sum1 = sums
    student, teacher, gap = _load(student_ptr, teacher_ptr, block, V, DIFFERENCE, MASKED, BLOCK)

    past, present = meet(teacher, t_top, minus_scale)
    t_sum = t_sum * past + present
    t_gap_sum = t_gap_sum * past + present * gap
    t_at = tl.where(teacher > t_top, block, t_at)
    t_top = tl.maximum(t_top, teacher)

    past, present = meet(student, s_top, minus_scale)
    s_sum = s_sum * past + present
    if REVERSE:
        s_gap_sum = s_gap_sum * past + present * gap
    if BOTH:
        past, present = meet(student, s_top, -LOG2E)
        s_sum1 = s_sum1 * past + present
    s_at = tl.where(student > s_top, block, s_at)
    s_top = tl.maximum(s_top, student)
    return t_top, t_sum, t_at, t_gap_sum, s_top, s_sum, s_at, s_gap_sum, s_sum1


@triton.jit
def _first_of(top, at, largest, V: tl.constexpr, BLOCK: tl.constexpr):
    """The first column that holds ``largest``."""
    return tl.min(tl.where(top == largest, at * BLOCK + tl.arange(0, BLOCK), V), 0)


@triton.jit
def _add_variation(
    apart, under, student_ptr, teacher_ptr, block, scale, s_largest, s_bits, t_largest, t_bits, V: tl.constexpr,
    DIFFERENCE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a block to Σ |p_τ − q_τ| and Σ p_τ [p_τ < q_τ], of each lane."""
    student, teacher, _ = _load(student_ptr, teacher_ptr, block, V, DIFFERENCE, MASKED, BLOCK)
    p = tl.exp2((student - s_largest) * scale - s_bits)
    q = tl.exp2((teacher - t_largest) * scale - t_bits)
    return apart + tl.abs(p - q), under + tl.where(p < q, p, 0.0)


@triton.jit
def _store_gradient(
    student_ptr, teacher_ptr, grad_ptr, block, column, scale, s_largest, s_bits, s_bits1, t_largest, t_bits, s_gap,
    s_under, kl_factor, reverse_kl_weight, ce_weight, tv_factor, V: tl.constexpr, DIFFERENCE: tl.constexpr,
    REVERSE: tl.constexpr, CE: tl.constexpr, TV: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr,
    LOG2E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes kl_factor · (p_τ − q_τ) + reverse_kl_weight · p_τ · (s − t − Σ p_τ (s − t)) + ce_weight · (p − onehot)
    + tv_factor · p_τ · (Σ p_τ [p_τ < q_τ] − [p_τ < q_τ]).

    A probability is 2^(scale · (x − largest) − bits): the subtraction comes first, because it is exact for the tokens
    that matter, however large logits are.
    """
    student, teacher, gap = _load(student_ptr, teacher_ptr, block, V, DIFFERENCE, MASKED, BLOCK)
    v = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.exp2((student - s_largest) * scale - s_bits)
    q = tl.exp2((teacher - t_largest) * scale - t_bits)
    grad = kl_factor * (p - q)
    if REVERSE:
        grad += reverse_kl_weight * (p * (gap - s_gap))
    if TV:
        grad += tv_factor * (p * tl.where(p < q, s_under - 1.0, s_under))
    if CE:
        if BOTH:
            p = tl.exp2((student - s_largest) * LOG2E - s_bits1)
        grad += ce_weight * tl.where(v == column, p - 1.0, p)
    grad = grad.to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + v, grad, mask=v < V, eviction_policy="evict_first")
    else:
        tl.store(grad_ptr + v, grad, eviction_policy="evict_first")


@triton.jit
def _loss_of_logits(
    student_ptr, teacher_ptr, grad_ptr, labels_ptr, rows_ptr, student_stride, teacher_stride, grad_stride, label_stride,
    positions, kl_weight, reverse_kl_weight, ce_weight, tv_weight, temperature, IGNORE: tl.constexpr, V: tl.constexpr,
    DIFFERENCE: tl.constexpr, REVERSE: tl.constexpr, CE: tl.constexpr, TV: tl.constexpr, TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr, LOG2E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * grad_stride
    label = tl.load(labels_ptr + row * label_stride)
    FULL: tl.constexpr = V // BLOCK  # blocks without columns beyond the vocabulary
    RAGGED: tl.constexpr = V % BLOCK != 0
    BOTH: tl.constexpr = CE and TEMPERED  # the student's softmax at two temperatures
    kl, reverse_kl, ce, tv, agreement = 0.0, 0.0, 0.0, 0.0, 0.0
    if label != IGNORE:
        scale = LOG2E / temperature
        # Read before the gradient is written over the logits.
        known = (label >= 0) & (label < V)
        at_label = tl.load(student_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        if DIFFERENCE:
            at_label += tl.load(teacher_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        column = tl.where(known, label, -1).to(tl.int32)  # as wide as what it is compared with

        low = tl.full([BLOCK], -1e38, tl.float32)
        zero = tl.zeros([BLOCK], tl.float32)
        nowhere = tl.zeros([BLOCK], tl.int32)
        sums = (low, zero, nowhere, zero, low, zero, nowhere, zero, zero)
        for block in tl.range(0, FULL, num_stages=3):
            sums = _add_block(
                sums, student_ptr, teacher_ptr, block, -scale, V, DIFFERENCE, REVERSE, BOTH, False, LOG2E, BLOCK
            )
        if RAGGED:
            sums = _add_block(
                sums, student_ptr, teacher_ptr, FULL, -scale, V, DIFFERENCE, REVERSE, BOTH, True, LOG2E, BLOCK
            )
        t_top, t_sum, t_at, t_gap_sum, s_top, s_sum, s_at, s_gap_sum, s_sum1 = sums

        # The lanes' sums, brought to one reference. KL = lse(s/τ) − lse(t/τ) − Σ q (s − t)/τ, and the reverse one is
        # Σ p (s − t)/τ − lse(s/τ) + lse(t/τ), with p and q at temperature τ.
        t_largest, s_largest = tl.max(t_top, 0), tl.max(s_top, 0)
        t_share = tl.exp2((t_top - t_largest) * scale)
        t_total = tl.sum(t_sum * t_share, 0)
        s_share = tl.exp2((s_top - s_largest) * scale)
        s_total = tl.sum(s_sum * s_share, 0)
        t_gap = tl.sum(t_gap_sum * t_share, 0) / t_total
        kl = (s_largest - t_largest - t_gap) / temperature + tl.log(s_total / t_total)
        kl *= temperature * temperature
        s_gap = 0.0
        if REVERSE:
            s_gap = tl.sum(s_gap_sum * s_share, 0) / s_total
            reverse_kl = (s_gap - (s_largest - t_largest)) / temperature - tl.log(s_total / t_total)
            reverse_kl *= temperature * temperature
        same = _first_of(t_top, t_at, t_largest, V, BLOCK) == _first_of(s_top, s_at, s_largest, V, BLOCK)
        agreement = same.to(tl.float32)
        s_total1 = s_total
        if BOTH:
            s_total1 = tl.sum(s_sum1 * tl.exp2((s_top - s_largest) * LOG2E), 0)
        if CE:
            ce = s_largest - at_label + tl.log(s_total1)

        s_bits, s_bits1, t_bits = tl.log2(s_total), tl.log2(s_total1), tl.log2(t_total)
        s_under = 0.0
        if TV:
            apart, under = zero, zero
            if RAGGED:
                apart, under = _add_variation(
                    apart, under, student_ptr, teacher_ptr, FULL, scale, s_largest, s_bits, t_largest, t_bits, V,
                    DIFFERENCE, True, BLOCK,
                )  # fmt: skip
            for done in tl.range(0, FULL, num_stages=3):
                apart, under = _add_variation(
                    apart, under, student_ptr, teacher_ptr, FULL - 1 - done, scale, s_largest, s_bits, t_largest,
                    t_bits, V, DIFFERENCE, False, BLOCK,
                )  # fmt: skip
            tv = tl.sum(apart, 0) / 2
            s_under = tl.sum(under, 0)

        if GRADIENT:
            kl_factor, tv_factor = kl_weight * temperature, tv_weight / temperature
            if RAGGED:
                _store_gradient(
                    student_ptr, teacher_ptr, grad_ptr, FULL, column, scale, s_largest, s_bits, s_bits1, t_largest,
                    t_bits, s_gap, s_under, kl_factor, reverse_kl_weight, ce_weight, tv_factor, V, DIFFERENCE, REVERSE,
                    CE, TV, BOTH, True, LOG2E, BLOCK,
                )  # fmt: skip
            for done in tl.range(0, FULL, num_stages=3):
                _store_gradient(
                    student_ptr, teacher_ptr, grad_ptr, done if TV else FULL - 1 - done, column, scale, s_largest,
                    s_bits, s_bits1, t_largest, t_bits, s_gap, s_under, kl_factor, reverse_kl_weight, ce_weight,
                    tv_factor, V, DIFFERENCE, REVERSE, CE, TV, BOTH, False, LOG2E, BLOCK,
                )  # fmt: skip
    elif GRADIENT:
        for block in tl.range(0, tl.cdiv(V, BLOCK)):
            v = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(grad_ptr + v, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=v < V)
    tl.store(rows_ptr + row, kl)
    tl.store(rows_ptr + positions + row, ce)
    tl.store(rows_ptr + 2 * positions + row, agreement)
    if REVERSE:
        tl.store(rows_ptr + 3 * positions + row, reverse_kl)
    if TV:
        tl.store(rows_ptr + (4 if REVERSE else 3) * positions + row, tv)
