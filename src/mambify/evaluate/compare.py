"""Teacher and student side by side on several texts: a JSON-ready result and a table of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import Tensor

from mambify.errors import UsageError
from mambify.evaluate.blocks import read_blocks
from mambify.evaluate.bootstrap import Estimate, written
from mambify.evaluate.perplexity import LanguageModelScore, evaluate_language_model
from mambify.evaluate.scoring import Block
from mambify.tokenization import require_same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EvaluationText = str | Path | Tensor | Sequence[Block]
SourceProgress = Callable[[str, int, int], None]


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    sources: Mapping[str, EvaluationText],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    context_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    progress: SourceProgress | None = None,
) -> dict[str, Any]:
    """Scores both models on every source.

    Args:
        student: The model in question.
        teacher: What it is measured against; None scores the student alone.
        sources: By name: a file of plain text, a synthesized directory (its held-out side), or blocks as
            :func:`~mambify.evaluate.perplexity.evaluate_language_model` takes them.
        tokenizer: The student's; needed for files and directories.
        teacher_tokenizer: Checked against the student's when given.
        context_length: Block length of files and directories.
        max_tokens: Of every file or directory at most about this many tokens are read.
        batch_size: Blocks in a forward pass.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        progress: Called with (source, blocks done, blocks).

    Returns:
        ``{"context_length", "sources": {name: {"num_blocks", "num_tokens", "student", "teacher"}}}``; a
        model's part holds each figure (``perplexity``, ``nll``; the student's also ``kl``, ``top1_agreement``,
        ``perplexity_ratio``) and its 95% interval as ``<figure>_interval: [low, high]``, which a
        single block has not.

    Raises:
        TokenizerMismatchError: tokenizers or vocabularies that differ.
        UsageError: no source, or one that cannot be read (see :func:`~mambify.evaluate.blocks.read_blocks`).
    """
    if not sources:
        raise UsageError("nothing to evaluate on: give a text file or synthesized text")
    if tokenizer is not None and teacher_tokenizer is not None:
        require_same_tokenizer(teacher_tokenizer, tokenizer)
    # Every source is read before any is scored: a bad path is known at once.
    texts = {name: _blocks(source, tokenizer, context_length, max_tokens) for name, source in sources.items()}
    results = {}
    for name, blocks in texts.items():
        score = evaluate_language_model(
            student,
            blocks,
            teacher=teacher,
            batch_size=batch_size,
            resamples=resamples,
            seed=seed,
            progress=None if progress is None else _named(progress, name),
        )
        results[name] = side_by_side(score)
    return {"context_length": context_length, "sources": results}


def side_by_side(score: LanguageModelScore) -> dict[str, Any]:
    """A score as plain JSON values, split into the student's and the teacher's figures."""
    student = {
        "perplexity": score.perplexity,
        "nll": score.nll,
        "perplexity_ratio": score.perplexity_ratio,
        "kl": score.kl,
        "top1_agreement": score.top1_agreement,
    }
    teacher = {"perplexity": score.teacher_perplexity, "nll": score.teacher_nll}
    result: dict[str, Any] = {"num_blocks": score.num_blocks, "num_tokens": score.num_tokens}
    result["student"] = _flat(student)
    if score.teacher_perplexity is not None:
        result["teacher"] = _flat(teacher)
    return result


def comparison_table(result: Mapping[str, Any], *, title: str | None = None) -> Table:
    """A table of what :func:`compare` returned, a text a row."""
    table = Table(title=title, caption="in brackets: 95% bootstrap interval over blocks of text")
    sources: Mapping[str, Mapping[str, Any]] = result["sources"]
    has_teacher = any("teacher" in source for source in sources.values())
    table.add_column("text")
    table.add_column("tokens", justify="right")
    if has_teacher:
        table.add_column("teacher perplexity", justify="right")
    table.add_column("student perplexity" if has_teacher else "perplexity", justify="right")
    if has_teacher:
        for heading in ("ratio", "KL", "top-1 agreement"):
            table.add_column(heading, justify="right")
    for name, source in sources.items():
        cells = [name, f"{source['num_tokens']:,}"]
        if has_teacher:
            cells.append(written(source["teacher"], "perplexity", ".2f"))
        cells.append(written(source["student"], "perplexity", ".2f"))
        if has_teacher:
            cells += [
                written(source["student"], "perplexity_ratio", ".3f"),
                written(source["student"], "kl", ".4f"),
                written(source["student"], "top1_agreement", ".1%"),
            ]
        table.add_row(*cells)
    return table


def _blocks(
    source: EvaluationText,
    tokenizer: PreTrainedTokenizerBase | None,
    context_length: int,
    max_tokens: int | None,
) -> Tensor | Sequence[Block]:
    if not isinstance(source, str | Path):
        return source
    if tokenizer is None:
        raise UsageError(f"{source} must be tokenized, and the model has no tokenizer")
    return read_blocks(source, tokenizer, context_length=context_length, max_tokens=max_tokens)


def _named(progress: SourceProgress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _flat(figures: Mapping[str, Estimate | None]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, estimate in figures.items():
        if estimate is not None:
            flat |= estimate.figures(name)
    return flat
