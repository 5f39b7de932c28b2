"""How the students of an experiment are scored: all alike, and beside the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mambify.data.preferences import PreferenceDataset, as_blocks, read_preferences
from mambify.errors import UnknownSourceError
from mambify.evaluate.blocks import read_blocks
from mambify.evaluate.compare import compare
from mambify.evaluate.preferences import as_json, preference_accuracy
from mambify.evaluate.tasks import compare_on_tasks, load_tasks
from mambify.experiments.request import Request
from mambify.families.load import load, load_tokenizer, require_tokenizer
from mambify.model import HybridBlock, HybridForCausalLM


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every student.

    Attributes:
        teacher: what it is measured against.
        sources: held-out sides of synthesized text, and files.
        context_length: of a block; pairs of answers have twice as much.
        max_tokens: of each source.
        preferences: pairs, or ``None``.
        tasks, data_dir, limit: zero-shot tasks from files.
    """

    teacher: str
    sources: tuple[str, ...]
    context_length: int
    max_tokens: int
    preferences: str | None = None
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    limit: int | None = None

    @classmethod
    def of(cls, request: Request) -> Evaluation:
        """What ``request`` asks to be measured."""
        return cls(
            request.teacher,
            (*request.data, *request.text),
            request.context_length,
            request.max_tokens,
            request.heldout_preferences,
            request.task_names,
            request.data_dir,
            request.limit,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Evaluation:
        """What :meth:`as_json` gave."""
        lists = {name: tuple(part) for name, part in value.items() if isinstance(part, list)}
        return cls(**value | lists)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def check_evaluation(evaluation: Evaluation) -> None:
    """Reads all that students will be scored on, so that what cannot be read is known before any is trained.

    Raises:
        UsageError: a text, pairs or questions that cannot be read.
        MissingDependencyError: tasks without lm-eval.
    """
    tokenizer = load_tokenizer(evaluation.teacher)
    if tokenizer is None:
        raise UnknownSourceError(f"{evaluation.teacher} has no tokenizer, and text must be tokenized")
    for source in evaluation.sources:
        read_blocks(source, tokenizer, context_length=evaluation.context_length, max_tokens=evaluation.context_length)
    if evaluation.preferences is not None:
        read_preferences(evaluation.preferences, tokenizer)
    if evaluation.tasks:
        load_tasks(evaluation.tasks, data_dir=evaluation.data_dir)


def score(
    student: Path, evaluation: Evaluation, *, device: str, silenced: bool = False, say: Callable[[str], None]
) -> dict[str, Any]:
    """Scores a saved student.

    Args:
        silenced: with its new mixers giving nothing.

    Returns:
        ``sources`` (as :func:`mambify.evaluate.compare.compare` gives them), and where asked for ``preferences`` (as
        :func:`mambify.evaluate.preferences.as_json`) and ``tasks``, ``means`` (as ``compare_on_tasks``).
    """
    say("scoring")
    loaded = load(student, device=device)
    teacher = load(evaluation.teacher, device=device, with_tokenizer=False).model
    tokenizer = require_tokenizer(loaded)
    with without_mixers(loaded.model) if silenced else nullcontext():
        result = compare(
            loaded.model,
            teacher,
            {source: Path(source) for source in evaluation.sources},
            tokenizer=tokenizer,
            context_length=evaluation.context_length,
            max_tokens=evaluation.max_tokens,
        )
        if evaluation.preferences is not None:
            read = read_preferences(evaluation.preferences, tokenizer)
            pairs = PreferenceDataset(read.pairs, 2 * evaluation.context_length, dropped=read.dropped)
            say(f"asking for preferences, {len(pairs)} pairs")
            result["preferences"] = as_json(preference_accuracy(loaded.model, teacher, as_blocks(pairs)))
        if evaluation.tasks:
            say(f"running {', '.join(evaluation.tasks)}")
            tasks = load_tasks(evaluation.tasks, data_dir=evaluation.data_dir)
            answered = compare_on_tasks(loaded.model, teacher, tasks, tokenizer=tokenizer, limit=evaluation.limit)
            result |= {name: answered[name] for name in ("tasks", "means")}
    return result


@contextmanager
def without_mixers(student: HybridForCausalLM) -> Iterator[None]:
    """While open, the layers that were converted add nothing to the residual stream: their mixers are removed."""

    def silence(_: nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        y_BTD, state = output
        return torch.zeros_like(y_BTD), state

    blocks = [block for block in student.model.layers if isinstance(block, HybridBlock)]
    hooks = [blocks[i].mixer.register_forward_hook(silence) for i in student.config.converted_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
