"""``mambify evaluate``: perplexity, preferences, tasks, and beside a teacher KL, agreement and paired differences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import (
    announcer,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    require_writable_file,
    stdout,
    working,
)
from mambify.errors import InvalidOptionError, UnknownSourceError, UsageError
from mambify.io import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from mambify.data.preferences import PreferenceDataset
    from mambify.evaluate.tasks import TaskSet
    from mambify.families.load import LoadedModel

EXAMPLE = "mambify evaluate runs/probe/student --teacher smollm2 --text book.txt --tasks arc_easy,piqa"
_STDOUT = Path("-")
_BLOCKS = 8


def evaluate(
    model: options.Model,
    teacher: Annotated[str | None, typer.Option(help="Measure the distance to this model as well.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file; may be given several times.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Synthesized text: its held-out side.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of a block; the first of each is only context.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text at most about so many tokens.")] = None,
    preferences: Annotated[list[Path] | None, typer.Option(help="Pairs of answers, of which one is preferred.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, by name: arc_easy,piqa,openbookqa.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Read the tasks' questions from jsonl files here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each task only so many questions.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples in a prompt; else the task's own.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask tasks in the chat template.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks, or choices of tasks, in a pass; else 8, or as many as fit."),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file as JSON; - is stdout.")] = None,
) -> None:
    """Measure a model on held-out text or on tasks, alone or beside a teacher.

    On text: perplexity; with --teacher also the KL divergence to it and how often the likeliest tokens agree.
    On pairs of answers: how often the preferred one comes first, by log-probability and by its gain on the teacher.
    On tasks: accuracies; with --teacher also the differences, question by question.
    Each figure comes with a 95% bootstrap interval, over blocks of text, pairs or questions.
    """
    sources = _sources(text or [], data or [])
    names = _task_names(tasks, data_dir=data_dir, limit=limit, num_fewshot=num_fewshot, chat_template=chat_template)
    if not sources and not names and not preferences:
        raise UsageError("nothing to evaluate on: give --text FILE, --data DIR, --preferences FILE or --tasks NAMES")
    if json is not None and json != _STDOUT:
        require_writable_file(json)
    quiet = json == _STDOUT
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; tqdm looks at this when it is first imported
    quiet_libraries()
    from mambify.evaluate import read_blocks
    from mambify.families.load import as_dtype, load, load_config, load_tokenizer

    as_dtype(dtype)
    place = options.pick_device(device)
    load_config(model)
    own, teachers = load_tokenizer(model), None if teacher is None else load_tokenizer(teacher)
    announce = announcer(quiet=quiet)
    # Texts and questions before models: what cannot be read is known before any weight is loaded.
    blocks = {}
    if sources:
        shared = _shared_tokenizer(own, teachers)
        blocks = {
            name: read_blocks(path, shared, context_length=context_length, max_tokens=max_tokens)
            for name, path in sources.items()
        }
    pairs = {}
    if preferences:
        shared = _shared_tokenizer(own, teachers)
        pairs = {str(path): _read_pairs(path, shared, context_length, announce) for path in preferences}
    questions = None
    if names:
        if own is None and teachers is None:
            raise UnknownSourceError("the model has no tokenizer, and the questions must be tokenized")
        from mambify.evaluate.tasks import load_tasks

        with working("loading tasks", quiet=quiet):
            questions = load_tasks(names, data_dir=data_dir, num_fewshot=num_fewshot)
    announce(f"loading {model}")
    student = load(model, dtype=dtype, device=place, with_tokenizer=False)
    reference = None
    if teacher is not None:
        announce(f"loading {teacher}")
        reference = load(teacher, dtype=dtype, device=place, with_tokenizer=False)
    result: dict[str, Any] = {"model": model, "teacher": teacher}
    if blocks:
        result |= _on_text(student, reference, blocks, context_length, batch_size or _BLOCKS, quiet=quiet)
    if pairs:
        result |= _on_pairs(student, reference, pairs, batch_size or _BLOCKS, quiet=quiet)
    if questions is not None:
        tokenizers = own or teachers, teachers or own
        result |= _on_tasks(
            student,
            reference,
            questions,
            tokenizers,
            limit,
            chat_template=chat_template,
            batch_size=batch_size,
            quiet=quiet,
        )
    if quiet:
        print_json(result)
        return
    _print(result)
    if json is not None:
        write_json(json, result)
        stdout().print(f"figures written to {json}", markup=False)


def _on_text(
    student: LoadedModel,
    teacher: LoadedModel | None,
    blocks: dict[str, list[Tensor]],
    context_length: int,
    batch_size: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from mambify.evaluate import compare

    with progress_bar(quiet=quiet) as progress:
        bars = {name: progress.add_task(name, total=len(blocks[name]), note="blocks") for name in blocks}
        return compare(
            student.model,
            None if teacher is None else teacher.model,
            blocks,
            context_length=context_length,
            batch_size=batch_size,
            progress=lambda name, done, total: progress.update(bars[name], completed=done, total=total),
        )


def _read_pairs(
    path: Path, tokenizer: PreTrainedTokenizerBase, context_length: int, announce: Callable[[str], None]
) -> PreferenceDataset:
    from mambify.data.preferences import PreferenceDataset, describe, read_preferences

    read = read_preferences(path, tokenizer)
    pairs = PreferenceDataset(read.pairs, context_length, dropped=read.dropped)
    announce(f"{path}: {describe(len(pairs), pairs.dropped)}")
    return pairs


def _on_pairs(
    student: LoadedModel,
    teacher: LoadedModel | None,
    pairs: dict[str, PreferenceDataset],
    batch_size: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from mambify.data.preferences import as_blocks
    from mambify.evaluate.preferences import as_json, preference_accuracy

    results = {}
    with progress_bar(quiet=quiet) as progress:
        for name, dataset in pairs.items():
            bar = progress.add_task(name, total=2 * len(dataset), note="answers")
            score = preference_accuracy(
                student.model,
                None if teacher is None else teacher.model,
                as_blocks(dataset),
                batch_size=batch_size,
                progress=lambda done, total, bar=bar: progress.update(bar, completed=done, total=total),  # type: ignore[misc]
            )
            results[name] = as_json(score) | {"dropped": dict(dataset.dropped)}
    return {"preferences": results}


def _on_tasks(
    student: LoadedModel,
    teacher: LoadedModel | None,
    questions: TaskSet,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    limit: int | None,
    *,
    chat_template: bool,
    batch_size: int | None,
    quiet: bool,
) -> dict[str, Any]:
    from mambify.evaluate.tasks import compare_on_tasks

    own, teachers = tokenizers
    assert own is not None
    with progress_bar(quiet=quiet) as progress:
        roles = ["student"] if teacher is None else ["teacher", "student"]
        bars = {role: progress.add_task(role, total=None, note="") for role in roles}
        return compare_on_tasks(
            student.model,
            None if teacher is None else teacher.model,
            questions,
            tokenizer=own,
            teacher_tokenizer=teachers,
            limit=limit,
            chat_template=chat_template,
            batch_size=batch_size,
            progress=lambda role, what, done, total: progress.update(
                bars[role], completed=done, total=total, note=what
            ),
        )


def _print(result: dict[str, Any]) -> None:
    if "sources" in result:
        from mambify.evaluate import comparison_table

        print_table(comparison_table(result))
    if "preferences" in result:
        from mambify.evaluate import preference_table

        print_table(preference_table(result["preferences"]))
    if "tasks" in result:
        from mambify.evaluate.tasks import task_table

        print_table(task_table(result))


def _sources(texts: list[Path], directories: list[Path]) -> dict[str, Path]:
    """Name → path of every text; the name is the path as it was given.

    Raises:
        UnknownSourceError: one that is not there.
    """
    for path in texts:
        if not path.is_file():
            raise UnknownSourceError(f"no text file {path}")
    for path in directories:
        if not path.is_dir():
            raise UnknownSourceError(f"no directory {path}: --data takes one that `mambify synthesize` wrote")
    return {str(path): path for path in (*directories, *texts)}


def _task_names(tasks: str | None, **only_for_tasks: object) -> list[str]:
    """``"arc_easy,piqa"`` → its names.

    Raises:
        InvalidOptionError: an empty name, or an option that says nothing without tasks.
    """
    if tasks is None:
        for name, value in only_for_tasks.items():
            if value not in (None, False):
                raise InvalidOptionError(f"--{name.replace('_', '-')} is for tasks: give --tasks NAMES too")
        return []
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise InvalidOptionError(f"'{tasks}' is no list of tasks: write it like arc_easy,piqa")
    return names


def _shared_tokenizer(
    own: PreTrainedTokenizerBase | None, teachers: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer to read texts with; the two models' must be the same one.

    Raises:
        TokenizerMismatchError: they are not.
        UnknownSourceError: neither model has one.
    """
    from mambify.tokenization import require_same_tokenizer

    if own is not None and teachers is not None:
        require_same_tokenizer(teachers, own, names=("teacher", "model"))
    tokenizer = own or teachers
    if tokenizer is None:
        raise UnknownSourceError("the model has no tokenizer, and the text must be tokenized")
    return tokenizer
