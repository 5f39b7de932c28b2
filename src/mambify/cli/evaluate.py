"""``mambify evaluate``: perplexity, preferences, tasks, and beside a teacher KL, agreement and paired differences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

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
)
from mambify.errors import InvalidOptionError, UnknownSourceError, UsageError
from mambify.io import write_json

EXAMPLE = "mambify evaluate runs/probe/student --teacher smollm2 --text book.txt --tasks arc_easy,piqa"
_STDOUT = Path("-")


def evaluate(
    model: options.Model,
    teacher: Annotated[str | None, typer.Option(help="Measure the distance to this model as well.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text, or rows (.jsonl, .json); may be given several times.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Synthesized text: its held-out side.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of a block; the first of each is only context.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text at most about so many tokens.")] = None,
    preferences: Annotated[list[Path] | None, typer.Option(help="Pairs of answers, of which one is preferred.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, by name: arc_easy,piqa,openbookqa.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Read the tasks' questions from jsonl files here.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each task only so many questions, of preferences pairs.")
    ] = None,
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
    names = _task_names(tasks, data_dir=data_dir, num_fewshot=num_fewshot, chat_template=chat_template)
    if limit is not None and not names and not preferences:
        raise InvalidOptionError("--limit is for tasks and pairs: give --tasks NAMES or --preferences FILE too")
    if not sources and not names and not preferences:
        raise UsageError("nothing to evaluate on: give --text FILE, --data DIR, --preferences FILE or --tasks NAMES")
    if json is not None and json != _STDOUT:
        require_writable_file(json)
    quiet = json == _STDOUT
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; tqdm looks at this when it is first imported
    quiet_libraries()
    from mambify.families.load import as_dtype, load, load_config, load_tokenizer
    from mambify.workflows.evaluate import evaluate as score
    from mambify.workflows.evaluate import read_material, require_positions

    as_dtype(dtype)
    place = options.pick_device(device)
    configs = {name: load_config(name) for name in (model, teacher) if name is not None}
    announce = announcer(quiet=quiet)
    # Texts and questions before models: what cannot be read is known before any weight is loaded.
    material = read_material(
        load_tokenizer(model),
        None if teacher is None else load_tokenizer(teacher),
        texts=sources,
        preferences=preferences or [],
        tasks=names,
        context_length=context_length,
        max_tokens=max_tokens,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
        limit=limit,
        announce=announce,
    )
    for name, config in configs.items():
        require_positions(material, config, name)
    announce(f"loading {model}")
    student = load(model, dtype=dtype, device=place, with_tokenizer=False).model
    reference = None
    if teacher is not None:
        announce(f"loading {teacher}")
        reference = load(teacher, dtype=dtype, device=place, with_tokenizer=False).model
    with progress_bar(quiet=quiet) as bars:
        rows: dict[str, Any] = {}

        def tell(what: str, done: int, total: int, note: str) -> None:
            if what not in rows:
                rows[what] = bars.add_task(what, total=total, note=note)
            bars.update(rows[what], completed=done, total=total, note=note)

        scores = score(
            student,
            reference,
            material,
            context_length=context_length,
            batch_size=batch_size,
            task_batch_size=batch_size,
            limit=limit,
            chat_template=chat_template,
            progress=tell,
        )
    result = {"model": model, "teacher": teacher} | scores
    if quiet:
        print_json(result)
        return
    _print(result)
    if json is not None:
        write_json(json, result)
        stdout().print(f"figures written to {json}", markup=False)


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


def _sources(texts: list[Path], directories: list[Path]) -> list[Path]:
    """Every text that is to be scored.

    Raises:
        UnknownSourceError: one that is not there.
    """
    for path in texts:
        if not path.is_file():
            raise UnknownSourceError(f"no text file {path}")
    for path in directories:
        if not path.is_dir():
            raise UnknownSourceError(f"no directory {path}: --data takes one that `mambify synthesize` wrote")
    return [*directories, *texts]


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
