"""Perplexity of a language model and, beside its teacher, KL divergence and top-1 agreement.

Perplexity is exp of the mean negative log likelihood of a token given those before it in its block; KL is the
mean over the same positions of KL(teacher‖student) over the whole vocabulary; agreement is how often the two
models' likeliest tokens are the same.

Letters: N blocks, T tokens of a block, Q summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError, TokenizerMismatchError, UsageError
from mambify.evaluate.bootstrap import Array, Estimate, bootstrap
from mambify.evaluate.scoring import COLUMNS, Block, Scorer, as_block, make_batch, score_batch
from mambify.language_model import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LanguageModelScore:
    """How well a model predicts text, with 95% intervals; the teacher's figures are None without a teacher.

    ``nll`` is in nats a token. ``perplexity_ratio`` is the model's perplexity over the teacher's.
    """

    num_blocks: int
    num_tokens: int
    nll: Estimate
    perplexity: Estimate
    teacher_nll: Estimate | None = None
    teacher_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None


def evaluate_language_model(
    model: PreTrainedModel,
    blocks: Tensor | Sequence[Block],
    *,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    chunk_tokens: int = 256,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> LanguageModelScore:
    """Scores ``model``, and against ``teacher`` if given, on blocks of tokens.

    Args:
        model: A causal language model, evaluated in its own dtype and on its own device.
        blocks: ``[N, T]`` token ids; or blocks of any lengths: token ids, or mappings of ``input_ids`` with
            ``labels`` (-100: not counted), ``attention_mask`` (0: padding) and ``position_ids``, such as a
            packed data set. A block's first token is context only. The intervals resample blocks.
        teacher: A model over the same vocabulary.
        batch_size: Blocks in a forward pass.
        chunk_tokens: Positions whose whole distributions are held at a time, in float32.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        progress: Called with (blocks done, N).

    Raises:
        TokenizerMismatchError: the two models have vocabularies of different sizes.
        UsageError: no block, or no token to count in any.
        InvalidOptionError: a batch size or a count below 1.
        MambifyError: logits that are not numbers.
    """
    for name, value in (("batch_size", batch_size), ("chunk_tokens", chunk_tokens), ("resamples", resamples)):
        if value < 1:
            raise InvalidOptionError(f"{name} must be at least 1, not {value}")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise TokenizerMismatchError(
            f"the teacher has a vocabulary of {teacher.config.vocab_size} tokens "
            f"and the student one of {model.config.vocab_size}"
        )
    sums_NQ = sums_over_blocks(model, teacher, blocks, batch_size, chunk_tokens, progress)
    num_tokens = int(sums_NQ[:, 0].sum())
    if num_tokens == 0:
        raise UsageError("no token to evaluate on: the text is empty, or all of it is masked")
    statistics = {"nll": _mean("nll"), "perplexity": _exp_mean("nll")}
    if teacher is not None:
        statistics |= {
            "teacher_nll": _mean("teacher_nll"),
            "teacher_perplexity": _exp_mean("teacher_nll"),
            "perplexity_ratio": _perplexity_ratio,
            "kl": _mean("kl"),
            "top1_agreement": _mean("agreement"),
        }
    estimates = bootstrap(sums_NQ, statistics, resamples=resamples, seed=seed)
    return LanguageModelScore(num_blocks=len(sums_NQ), num_tokens=num_tokens, **estimates)


def sums_over_blocks(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    blocks: Tensor | Sequence[Block],
    batch_size: int,
    chunk_tokens: int,
    progress: Progress | None,
) -> npt.NDArray[np.float64]:
    """Sums over each block, ``[N, Q]`` in the order of ``COLUMNS``; arguments of :func:`evaluate_language_model`."""
    prepared = [as_block(blocks[index]) for index in range(len(blocks))]
    sums_NQ = np.zeros((len(prepared), len(COLUMNS)))
    # Blocks of like length together: little of a batch is padding.
    order = sorted(range(len(prepared)), key=lambda index: -len(prepared[index]["input_ids"]))
    with torch.inference_mode(), evaluating(model, teacher):
        student_scorer = Scorer(model)
        teacher_scorer = None if teacher is None else Scorer(teacher)
        for first in range(0, len(order), batch_size):
            batch = make_batch(prepared, order[first : first + batch_size])
            sums_NQ[batch.indices] = score_batch(student_scorer, teacher_scorer, batch, chunk_tokens=chunk_tokens)
            if progress is not None:
                progress(first + len(batch.indices), len(order))
    return sums_NQ


def _mean(column: str) -> Callable[[Array], Array]:
    index = COLUMNS.index(column)
    return lambda totals: totals[..., index] / totals[..., 0]


def _exp_mean(column: str) -> Callable[[Array], Array]:
    mean = _mean(column)
    return lambda totals: np.exp(mean(totals))


def _perplexity_ratio(totals: Array) -> Array:
    ratio: Array = np.exp(_mean("nll")(totals) - _mean("teacher_nll")(totals))
    return ratio
