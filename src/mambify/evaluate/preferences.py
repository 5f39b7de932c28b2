"""How often a model sides with people between two answers to a prompt.

Two ways to ask it. By its own probabilities: which answer is likelier, as a whole or for a token. By the reward that
preference training gave it (arXiv 2305.18290): how much likelier an answer became than it was to a reference.

Letters: N pairs, Q summed quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mambify.errors import TokenizerMismatchError, UsageError
from mambify.evaluate.bootstrap import Array, Estimate, bootstrap, written
from mambify.evaluate.perplexity import Progress, sums_over_blocks
from mambify.evaluate.scoring import COLUMNS, Block

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PreferenceScore:
    """Shares of pairs, with 95% intervals over pairs; a tie counts as half. The reference's are None without one.

    Attributes:
        accuracy: the chosen answer is the likelier one.
        accuracy_per_token: it is the likelier one for a token, so that length has no say.
        reward_accuracy: its log-probability has gained more on the reference than the rejected one's.
        margin: by how much more on average, in nats (DPO's reward margin over its beta).
    """

    num_pairs: int
    accuracy: Estimate
    accuracy_per_token: Estimate
    reward_accuracy: Estimate | None = None
    margin: Estimate | None = None
    reference_accuracy: Estimate | None = None
    reference_accuracy_per_token: Estimate | None = None


def preference_accuracy(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    pairs: Sequence[tuple[Block, Block]],
    *,
    batch_size: int = 8,
    chunk_tokens: int = 256,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreferenceScore:
    """Scores ``model``, and against ``reference`` if given, on pairs of a chosen and a rejected conversation.

    Args:
        model: a causal language model, evaluated in its own dtype and on its own device.
        reference: what a reward is measured against: the teacher, or the model before preference training.
        pairs: blocks with ``labels`` that are -100 outside the answers, as
            :func:`~mambify.evaluate.perplexity.evaluate_language_model` takes them.
        batch_size, chunk_tokens, resamples, seed, progress: as there.

    Raises:
        TokenizerMismatchError: vocabularies of different sizes.
        UsageError: no pair, or an answer without a token.
    """
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise TokenizerMismatchError(
            f"the reference has a vocabulary of {reference.config.vocab_size} tokens "
            f"and the model one of {model.config.vocab_size}"
        )
    if not pairs:
        raise UsageError("no pair of answers to evaluate on")
    blocks = [block for pair in pairs for block in pair]
    sums_N2Q = sums_over_blocks(model, reference, blocks, batch_size, chunk_tokens, progress).reshape(len(pairs), 2, -1)
    tokens_N2, nll_N2, reference_N2 = (sums_N2Q[:, :, COLUMNS.index(c)] for c in ("tokens", "nll", "teacher_nll"))
    if not tokens_N2.all():
        raise UsageError("an answer without a token: raise the context length, or leave that pair out")
    columns = {
        "pairs": np.ones(len(pairs)),
        "accuracy": _wins(-nll_N2),
        "accuracy_per_token": _wins(-nll_N2 / tokens_N2),
    }
    if reference is not None:
        gain_N2 = reference_N2 - nll_N2
        columns |= {
            "reward_accuracy": _wins(gain_N2),
            "margin": gain_N2[:, 0] - gain_N2[:, 1],
            "reference_accuracy": _wins(-reference_N2),
            "reference_accuracy_per_token": _wins(-reference_N2 / tokens_N2),
        }
    statistics = {name: _mean(index) for index, name in enumerate(columns) if index}
    estimates = bootstrap(np.stack(list(columns.values()), axis=1), statistics, resamples=resamples, seed=seed)
    return PreferenceScore(len(pairs), **estimates)


def _wins(score_N2: Array) -> Array:
    """1 where the first of two scores is the higher one, 0 where it is not, ½ between equals."""
    wins: Array = (np.sign(score_N2[:, 0] - score_N2[:, 1]) + 1) / 2
    return wins


def _mean(index: int) -> Callable[[Array], Array]:
    return lambda totals: totals[..., index] / totals[..., 0]


def as_json(score: PreferenceScore) -> dict[str, Any]:
    """A score as plain JSON values: each figure, and its interval as ``<figure>_interval: [low, high]``.

    A single pair has no interval.
    """
    flat: dict[str, Any] = {"num_pairs": score.num_pairs}
    for name, value in vars(score).items():
        if isinstance(value, Estimate):
            flat |= value.figures(name)
    return flat


_ROWS = {
    "reward_accuracy": "reward over the teacher",
    "accuracy": "log-probability",
    "accuracy_per_token": "log-probability of a token",
    "reference_accuracy": "teacher's log-probability",
    "reference_accuracy_per_token": "teacher's log-probability of a token",
}


def preference_table(results: dict[str, dict[str, Any]]) -> Table:
    """A table of :func:`as_json`'s figures, by the name of the pairs."""
    table = Table(caption="share of pairs with the chosen answer first; in brackets: 95% bootstrap interval over pairs")
    for heading in ("pairs", "by"):
        table.add_column(heading)
    table.add_column("accuracy", justify="right")
    for name, figures in results.items():
        label = f"{name} ({figures['num_pairs']:,})"
        for key, words in _ROWS.items():
            if key in figures:
                table.add_row(label, words, written(figures, key, ".1%"))
                label = ""
    return table
