"""How good a model is, on text, on pairs of answers and on tasks, alone or beside a teacher.

What is asked is read before any weight is loaded, so that what cannot be read is known at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mambify.data.documents import read_documents
from mambify.data.preferences import PreferenceDataset, as_blocks, describe, read_preferences
from mambify.errors import InvalidOptionError, UnknownSourceError
from mambify.evaluate.blocks import FILES_OF_ROWS, cut_into_blocks, read_blocks
from mambify.evaluate.compare import compare
from mambify.evaluate.preferences import as_json, preference_accuracy
from mambify.evaluate.tasks import TaskSet, compare_on_tasks, load_tasks
from mambify.language_model import position_limit
from mambify.tokenization import require_same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: told of what is being scored (a text, pairs, or the model that answers tasks): done, of how many, and a note
Progress = Callable[[str, int, int, str], None]

ROWS = 8  # sequences of a forward pass


@dataclass(frozen=True)
class Material:
    """What models are scored on, as they take it.

    Attributes:
        texts: name → blocks ``[1, T]`` of token ids.
        pairs: name → pairs of answers.
        tasks: questions of lm-eval's tasks.
        tokenizer, teacher_tokenizer: that tasks are asked with.
    """

    texts: Mapping[str, list[Tensor]]
    pairs: Mapping[str, PreferenceDataset]
    tasks: TaskSet | None
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase


def read_material(
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str | Path] = (),
    preferences: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    context_length: int = 512,
    pair_length: int | None = None,
    max_tokens: int | None = None,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> Material:
    """Reads all that a model, and the teacher beside it, are to be scored on.

    Args:
        tokenizer, teacher_tokenizer: the models' own; where one has none it is asked in the other's tokens.
        texts: files, and the held-out sides of directories made by ``synthesize``; a ``.jsonl`` or ``.json`` list holds
            rows, as text to train on does: see :func:`~mambify.data.documents.read_documents`.
        preferences: pairs of answers; see :func:`~mambify.data.preferences.read_preferences`.
        tasks: names; see :func:`~mambify.evaluate.tasks.load_tasks`, as for ``data_dir`` and ``num_fewshot``.
        context_length: tokens of a block; of an answer with its question ``pair_length``, by default the same.
        max_tokens: of each text.
        limit: so many pairs of each source, from its beginning.
        announce: told in words what is read.

    Raises:
        UnknownSourceError: neither model has a tokenizer, or a source is not there.
        TokenizerMismatchError: texts or pairs are asked for, and the two models read text otherwise.
        UsageError: a source that cannot be read.
        MissingDependencyError: tasks without lm-eval.
    """
    say = announce or (lambda _: None)
    own, teachers = tokenizer or teacher_tokenizer, teacher_tokenizer or tokenizer
    if own is None or teachers is None:
        raise UnknownSourceError("the model has no tokenizer, and what it is asked must be tokenized")
    if (texts or preferences) and own is not teachers:
        require_same_tokenizer(teachers, own, names=("teacher", "model"))
    blocks = {str(source): _blocks(source, own, context_length, max_tokens) for source in texts}
    pairs = {}
    for source in preferences:
        read = read_preferences(source, own)
        dataset = PreferenceDataset(read.pairs[:limit], pair_length or context_length, dropped=read.dropped)
        say(f"{source}: {describe(len(dataset), dataset.dropped)}")
        pairs[str(source)] = dataset
    questions = None
    if tasks:
        questions = load_tasks(tasks, data_dir=data_dir, num_fewshot=num_fewshot)
    return Material(blocks, pairs, questions, own, teachers)


def _blocks(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, context_length: int, max_tokens: int | None
) -> list[Tensor]:
    path = Path(source)
    if path.suffix not in FILES_OF_ROWS or path.is_dir():
        return read_blocks(path, tokenizer, context_length=context_length, max_tokens=max_tokens)
    documents = read_documents(path, tokenizer, split="all", max_tokens=max_tokens)
    return cut_into_blocks([row.input_ids.tolist() for row in documents], context_length, max_tokens=max_tokens)


def require_positions(material: Material, config: PreTrainedConfig, name: str) -> None:
    """Refuses texts and pairs that pass a model's positions; see :func:`mambify.language_model.position_limit`.

    Raises:
        InvalidOptionError: a block or conversation is longer.
    """
    limit = position_limit(config)
    texts = (block.numel() for blocks in material.texts.values() for block in blocks)
    answers = (
        len(one) for known in material.pairs.values() for pair in known.pairs for one in (pair.chosen, pair.rejected)
    )
    longest = max(itertools.chain(texts, answers), default=0)
    if limit is not None and longest > limit:
        raise InvalidOptionError(
            f"{longest} tokens at once pass the {limit} positions that the attention of {name} knows: give a context "
            f"length of at most {limit}"
        )


def evaluate(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    material: Material,
    *,
    context_length: int = 512,
    batch_size: int | None = None,
    task_batch_size: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores ``model`` on all of the material, and its distance to ``teacher`` where one is given.

    Args:
        context_length: that the texts were cut to.
        batch_size: blocks in a pass, 8 by default; ``task_batch_size`` choices of tasks, by default as many as fit.
        limit: of each task only so many questions.
        chat_template: tasks are asked through it.

    Returns:
        ``sources`` and what else :func:`~mambify.evaluate.compare.compare` gives, ``preferences`` by name
        (:func:`~mambify.evaluate.preferences.as_json`), and what
        :func:`~mambify.evaluate.tasks.compare_on_tasks` gives; of each only what was asked.

    Raises:
        InvalidOptionError: texts or pairs that are longer than the positions that a model's attention knows.
    """
    require_positions(material, model.config, "the model")
    if teacher is not None:
        require_positions(material, teacher.config, "the teacher")
    told: Progress = progress or (lambda *_: None)
    rows = batch_size or ROWS
    result: dict[str, Any] = {}
    if material.texts:
        result |= compare(
            model,
            teacher,
            material.texts,
            context_length=context_length,
            batch_size=rows,
            progress=lambda name, done, total: told(name, done, total, "blocks"),
        )
    for name, dataset in material.pairs.items():
        score = preference_accuracy(
            model,
            teacher,
            as_blocks(dataset),
            batch_size=rows,
            progress=lambda done, total, name=name: told(name, done, total, "answers"),  # type: ignore[misc]
        )
        found = as_json(score) | {"dropped": dict(dataset.dropped)}
        result["preferences"] = result.get("preferences", {}) | {name: found}
    if material.tasks is not None:
        result |= compare_on_tasks(
            model,
            teacher,
            material.tasks,
            tokenizer=material.tokenizer,
            teacher_tokenizer=material.teacher_tokenizer,
            limit=limit,
            chat_template=chat_template,
            batch_size=task_batch_size,
            progress=lambda role, what, done, total: told(role, done, total, what),
        )
    return result
