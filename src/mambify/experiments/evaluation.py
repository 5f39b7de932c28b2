"""How the students of an experiment are scored: all alike, and beside the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mambify.errors import UnknownSourceError
from mambify.experiments.request import Request
from mambify.families.load import LoadedModel, load, load_tokenizer, require_tokenizer
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.tokenization import require_same_tokenizer
from mambify.workflows.evaluate import Material, evaluate, read_material

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: pairs of answers are longer than text is cut: so many times context_length
_PAIR = 4
#: sequences of a forward pass, where there is room for more than usual
_ROWS_ON_GPU = 32


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every student.

    Attributes:
        teacher: what it is measured against.
        sources: held-out sides of synthesized text, and files.
        context_length: of a block; pairs of answers have four times as much.
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
    _read(replace(evaluation, max_tokens=evaluation.context_length), tokenizer)


def _read(evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase) -> Material:
    return read_material(
        tokenizer,
        texts=evaluation.sources,
        preferences=[] if evaluation.preferences is None else [evaluation.preferences],
        tasks=evaluation.tasks,
        context_length=evaluation.context_length,
        pair_length=_PAIR * evaluation.context_length,
        max_tokens=evaluation.max_tokens,
        data_dir=evaluation.data_dir,
    )


class Examination:
    """Scores students, all on the same texts, pairs and questions and beside the same teacher, which are read once.

    Args:
        teacher: loaded, anywhere; it is only read.
        device: where students are scored.

    Raises:
        UsageError, MissingDependencyError: see :func:`check_evaluation`.
    """

    def __init__(self, evaluation: Evaluation, teacher: LoadedModel, *, device: str) -> None:
        self.evaluation, self.device = evaluation, device
        self.tokenizer = require_tokenizer(teacher)
        self.material = _read(evaluation, self.tokenizer)
        there = teacher.model.device.type == torch.device(device).type
        self.teacher = teacher.model if there else copy.deepcopy(teacher.model).to(device)

    def score(self, student: str, *, silenced: bool = False, say: Callable[[str], None]) -> dict[str, Any]:
        """Scores a student.

        Args:
            student: a directory or an alias.
            silenced: with its new mixers giving nothing.

        Returns:
            ``sources`` (as :func:`mambify.evaluate.compare.compare` gives them), and where asked for ``preferences``
            (as :func:`mambify.evaluate.preferences.as_json`) and ``tasks``, ``means`` (as ``compare_on_tasks``).

        Raises:
            TokenizerMismatchError: it reads text otherwise than the teacher.
        """
        say("scoring")
        loaded = load(student, device=self.device)
        require_same_tokenizer(self.tokenizer, require_tokenizer(loaded))
        with without_mixers(loaded.model) if silenced else nullcontext():
            result = evaluate(
                loaded.model,
                self.teacher,
                self.material,
                context_length=self.evaluation.context_length,
                batch_size=_ROWS_ON_GPU if self.device.startswith("cuda") else None,
                limit=self.evaluation.limit,
            )
        result.pop("environment", None)  # the same for all
        if "preferences" in result:  # of one file
            (result["preferences"],) = result["preferences"].values()
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
