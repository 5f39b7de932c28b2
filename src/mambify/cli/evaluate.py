"""``mambify evaluate``: perplexity of a model and, beside its teacher, KL divergence and top-1 agreement."""

from __future__ import annotations

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
)
from mambify.errors import UnknownSourceError, UsageError
from mambify.io import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = "mambify evaluate runs/probe/student --teacher smollm2 --data data/smollm2 --text book.txt"
_STDOUT = Path("-")


def evaluate(
    model: options.Model,
    teacher: Annotated[str | None, typer.Option(help="Measure the distance to this model as well.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file; may be given several times.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Synthesized text: its held-out side.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens of a block; the first of each is only context.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Of each text at most about so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks in a forward pass.")] = 8,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file as JSON; - is stdout.")] = None,
) -> None:
    """Measure a model on held-out text, alone or beside a teacher.

    Perplexity; with --teacher also the KL divergence to it and how often the likeliest tokens agree.
    Each figure comes with a 95% bootstrap interval over blocks of text.
    """
    sources = _sources(text or [], data or [])
    if json is not None and json != _STDOUT:
        require_writable_file(json)
    quiet = json == _STDOUT
    quiet_libraries()
    from mambify.evaluate import compare, comparison_table, read_blocks
    from mambify.families.load import as_dtype, load, load_config, load_tokenizer

    as_dtype(dtype)
    place = options.pick_device(device)
    load_config(model)
    tokenizer = _shared_tokenizer(load_tokenizer(model), None if teacher is None else load_tokenizer(teacher))
    # Texts before models: what cannot be read is known before any weight is loaded.
    blocks = {
        name: read_blocks(path, tokenizer, context_length=context_length, max_tokens=max_tokens)
        for name, path in sources.items()
    }
    announce = announcer(quiet=quiet)
    announce(f"loading {model}")
    student = load(model, dtype=dtype, device=place)
    reference = None
    if teacher is not None:
        announce(f"loading {teacher}")
        reference = load(teacher, dtype=dtype, device=place)
    with progress_bar(quiet=quiet) as progress:
        tasks = {name: progress.add_task(name, total=len(blocks[name]), note="blocks") for name in blocks}
        result: dict[str, Any] = compare(
            student.model,
            None if reference is None else reference.model,
            blocks,
            context_length=context_length,
            batch_size=batch_size,
            progress=lambda name, done, total: progress.update(tasks[name], completed=done, total=total),
        )
    result = {"model": model, "teacher": teacher} | result
    if quiet:
        print_json(result)
        return
    print_table(comparison_table(result))
    if json is not None:
        write_json(json, result)
        stdout().print(f"figures written to {json}", markup=False)


def _sources(texts: list[Path], directories: list[Path]) -> dict[str, Path]:
    """Name → path of every text; the name is the path as it was given.

    Raises:
        UsageError: there is none.
        UnknownSourceError: one that is not there.
    """
    if not texts and not directories:
        raise UsageError("nothing to evaluate on: give --text FILE or --data DIR")
    for path in texts:
        if not path.is_file():
            raise UnknownSourceError(f"no text file {path}")
    for path in directories:
        if not path.is_dir():
            raise UnknownSourceError(f"no directory {path}: --data takes one that `mambify synthesize` wrote")
    return {str(path): path for path in (*directories, *texts)}


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
