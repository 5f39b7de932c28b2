"""What all commands share in speaking: figures on stdout, everything else on stderr, JSON where asked for.

A progress bar is drawn only on a terminal, so logs and pipes stay free of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mambify.errors import OutputWriteError
from mambify.io import require_room

_PIPE_WIDTH = 160


def stdout() -> Console:
    """Where a command's result goes; a file or a pipe gets tables wide enough not to be cut."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_PIPE_WIDTH)


def print_table(table: Table, console: Console | None = None) -> None:
    """A table on stdout; where the terminal is too narrow for it, row by row with the headings at the side."""
    console = console or stdout()
    unlimited = console.options.update(max_width=10_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="italic")
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        upright = Table.grid(padding=(0, 2))
        upright.add_column(style="dim")
        upright.add_column(overflow="fold")
        for column, cell in zip(table.columns, cells, strict=True):
            upright.add_row(column.header, cell)
        console.print(upright)
        console.print()
    if table.caption:
        console.print(table.caption, style="dim")


def stderr() -> Console:
    """Where a command speaks about what it is doing."""
    return Console(stderr=True, highlight=False)


def announcer(*, quiet: bool, console: Console | None = None) -> Callable[[str], None]:
    """Tells in words what begins, on stderr (above the bars of ``console`` where given); nothing when ``quiet``."""
    console = console or stderr()

    def announce(message: str) -> None:
        if not quiet:
            console.print(message, style="dim", markup=False, soft_wrap=True)  # a log has lines of any length

    return announce


def print_json(value: Any) -> None:
    """The result for machines: one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def progress_bar(*, quiet: bool = False, transient: bool = True, counted: bool = True) -> Iterator[Progress]:
    """A progress display on stderr; nothing where stderr is no terminal, or when ``quiet``."""
    console = stderr()
    counts = [MofNCompleteColumn()] if counted else []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
        transient=transient,
        disable=quiet or not console.is_terminal,
    ) as progress:
        yield progress


@contextmanager
def working(message: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on stderr while something without steps takes its time; nothing where there is no terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and advice out of what a command prints."""
    if not stderr().is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def require_writable_file(path: Path) -> None:
    """Checks before the work that a result file can be written after it.

    Raises:
        OutputWriteError: it is a directory, or its directory cannot be written.
    """
    if path.is_dir():
        raise OutputWriteError(f"cannot write {path}: it is a directory")
    require_room(path)
