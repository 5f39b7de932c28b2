"""The ``mambify`` command: which subcommands there are, and what becomes of their errors.

Exit status 0: done; 1: failed; 2: asked for wrongly; 130: interrupted. Nothing heavy is imported here, so that
``mambify --help`` answers at once; each subcommand imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mambify import __version__
from mambify.cli import (
    bench,
    card,
    chat,
    convert,
    distill,
    draft,
    evaluate,
    export,
    generate,
    info,
    pack,
    quickstart,
    select,
    synthesize,
)
from mambify.errors import MambifyError

_FAILED, _INTERRUPTED = 1, 130

#: name → (function, an example shown below its help), in the order that ``--help`` lists them
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "quickstart": (quickstart.quickstart, quickstart.EXAMPLE),
    "info": (info.info, info.EXAMPLE),
    "synthesize": (synthesize.synthesize, synthesize.EXAMPLE),
    "convert": (convert.convert, convert.EXAMPLE),
    "select": (select.select, select.EXAMPLE),
    "distill": (distill.distill, distill.EXAMPLE),
    "draft": (draft.draft, draft.EXAMPLE),
    "evaluate": (evaluate.evaluate, evaluate.EXAMPLE),
    "generate": (generate.generate, generate.EXAMPLE),
    "chat": (chat.chat, chat.EXAMPLE),
    "export": (export.export, export.EXAMPLE),
    "card": (card.card, card.EXAMPLE),
    "pack": (pack.pack, pack.EXAMPLE),
    "bench": (bench.bench, bench.EXAMPLE),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
for _name, (_function, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example:  {_example}")(_function)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mambify {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Pretrained Transformers into hybrid Mamba models that keep their quality, cost less and run faster."""


# typer has its own copy of click from 0.24 on; what both call ClickException is what a wrong usage raises.
_WrongUsage: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; an error of mambify's becomes one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(args=arguments, prog_name="mambify", standalone_mode=False)
    except MambifyError as error:
        return _refuse(str(error), error.exit_status)
    except _WrongUsage as error:
        return _refuse(error.format_message(), error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough; Python must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        return _refuse("interrupted", _INTERRUPTED)
    return int(status or 0)


def _refuse(message: str, status: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"mambify: error: {line}\n")
    return status
