"""Log-probabilities of labels from a chunk of logits, as one Triton kernel: one program a position.

The program reads its row once for the sum and once more, backwards, for the gradient; see
:mod:`mambify.ops.linear_kl.triton`, whose half this is. In bytes a position, with logits in float32 and a gradient of
2: the product with the head writes 4V, the sum reads 4V, the gradient reads 4V and writes 2V, its product reads 2V.

Letters: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.linear_kl.triton import meet

_LOG2E = 1.4426950408889634
_WARPS, _COLUMNS_A_THREAD = 8, 16  # four 16-byte loads a thread are under way at once


def logp_of_logits(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, *, gradient: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """See :func:`mambify.ops.linear_logprob.reference.logp_of_logits`.

    Rows may lie any distance apart, columns may not. A label that is neither ignored nor in the vocabulary has the
    log-probability NaN.
    """
    positions, vocabulary = logits_CV.shape
    logp_C = torch.empty(positions, dtype=torch.float32, device=logits_CV.device)
    grad_CV = logits_CV
    if gradient not in (None, logits_CV.dtype):
        grad_CV = torch.empty_strided(logits_CV.shape, logits_CV.stride(), dtype=gradient, device=logits_CV.device)
    block = min(32 * _WARPS * _COLUMNS_A_THREAD, triton.next_power_of_2(vocabulary))
    _logp_of_logits[(positions,)](
        logits_CV,
        grad_CV,
        labels_C,
        logp_C,
        logits_CV.stride(0),
        grad_CV.stride(0),
        labels_C.stride(0),
        IGNORE=ignore_index,
        V=vocabulary,
        GRADIENT=gradient is not None,
        LOG2E=_LOG2E,
        BLOCK=block,
        num_warps=max(block // (32 * _COLUMNS_A_THREAD), 1),
    )
    return logp_C, grad_CV if gradient is not None else None


@triton.jit
def _load(logits_ptr, block, V: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    v = block * BLOCK + tl.arange(0, BLOCK)
    if MASKED:  # below every logit, but finite: no infinity is subtracted from another
        return tl.where(v < V, tl.load(logits_ptr + v, mask=v < V, other=0.0).to(tl.float32), -1e38)
    return tl.load(logits_ptr + v).to(tl.float32)


@triton.jit
def _add_block(top, total, logits, LOG2E: tl.constexpr):
    """Adds a block to the sums. Every lane keeps its own, relative to the largest logit that it has seen."""
    past, present = meet(logits, top, -LOG2E)
    return tl.maximum(top, logits), total * past + present


@triton.jit
def _store_gradient(
    logits_ptr, grad_ptr, block, column, largest, bits, V: tl.constexpr, MASKED: tl.constexpr, LOG2E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes onehot − softmax."""
    logits = _load(logits_ptr, block, V, MASKED, BLOCK)
    v = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.exp2((logits - largest) * LOG2E - bits)  # the subtraction comes first: exact for the tokens that matter
    grad = tl.where(v == column, 1.0 - p, -p).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + v, grad, mask=v < V, eviction_policy="evict_first")
    else:
        tl.store(grad_ptr + v, grad, eviction_policy="evict_first")


@triton.jit
def _logp_of_logits(
    logits_ptr, grad_ptr, labels_ptr, logp_ptr, logits_stride, grad_stride, label_stride, IGNORE: tl.constexpr,
    V: tl.constexpr, GRADIENT: tl.constexpr, LOG2E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    label = tl.load(labels_ptr + row * label_stride)
    FULL: tl.constexpr = V // BLOCK  # blocks without columns beyond the vocabulary
    RAGGED: tl.constexpr = V % BLOCK != 0
    logp = 0.0
    if label != IGNORE:
        # Read before the gradient is written over the logits.
        known = (label >= 0) & (label < V)
        at_label = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        column = tl.where(known, label, -1).to(tl.int32)  # as wide as what it is compared with
        top = tl.full([BLOCK], -1e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for block in tl.range(0, FULL, num_stages=3):
            top, total = _add_block(top, total, _load(logits_ptr, block, V, False, BLOCK), LOG2E)
        if RAGGED:
            top, total = _add_block(top, total, _load(logits_ptr, FULL, V, True, BLOCK), LOG2E)
        largest = tl.max(top, 0)
        sum_of_exp = tl.sum(total * tl.exp2((top - largest) * LOG2E), 0)
        logp = at_label - largest - tl.log(sum_of_exp)
        if GRADIENT:
            bits = tl.log2(sum_of_exp)
            if RAGGED:
                _store_gradient(logits_ptr, grad_ptr, FULL, column, largest, bits, V, True, LOG2E, BLOCK)
            for done in tl.range(0, FULL, num_stages=3):
                _store_gradient(
                    logits_ptr, grad_ptr, FULL - 1 - done, column, largest, bits, V, False, LOG2E, BLOCK
                )  # fmt: skip
    elif GRADIENT:
        for block in tl.range(0, tl.cdiv(V, BLOCK)):
            v = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(grad_ptr + v, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=v < V)
    tl.store(logp_ptr + row, logp)
