"""``mambify chat``: a conversation in the terminal; reads lines from a pipe as well."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from mambify.cli import options
from mambify.cli.console import quiet_libraries, stderr, working
from mambify.errors import InvalidOptionError, UnsupportedError

EXAMPLE = "mambify chat runs/probe/student"
_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    draft: options.Draft = None,
    num_draft_tokens: options.NumDraftTokens = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    stats: options.Stats = False,
) -> None:
    """Talk with a model in the terminal.

    /reset forgets the conversation; /exit or Ctrl-D ends it. Lines from a pipe are answered one by one.
    """
    quiet_libraries()
    from mambify.decode import Conversation, Sampling, Session, stop_strings
    from mambify.decode.rows import require_count
    from mambify.families.load import load, require_tokenizer
    from mambify.language_model import position_limit

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    require_count(max_new_tokens)
    strings = stop_strings(stop)
    counts = options.parse_draft_counts(num_draft_tokens, draft)
    place = options.pick_device(device)
    with working(f"loading {model}"):
        loaded = load(model, dtype=dtype, device=place)
    tokenizer = require_tokenizer(loaded)
    if not tokenizer.chat_template:
        raise UnsupportedError(f"{model} has no chat template: use `mambify generate`, which continues plain text")
    limit = position_limit(loaded.model.config)
    if limit is not None and limit <= max_new_tokens:
        raise InvalidOptionError(
            f"--max-new-tokens {max_new_tokens} leaves no room: {model} reads {limit} tokens in all"
        )
    console = stderr()
    session = Session(
        loaded.model,
        tokenizer,
        sampling,
        max_length=limit,
        draft=options.load_draft(draft, target=loaded, device=place),
        num_draft_tokens=counts,
        stop=strings,
        on_growth=lambda holds: console.print(f"(buffers now hold {holds:,} tokens)", style="dim"),
    )
    room = None if limit is None else limit - max_new_tokens
    conversation = Conversation(tokenizer, system=system, max_prompt_tokens=room)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        console.print(_HELP, style="dim")
    for turn, words in enumerate(_lines(interactive=interactive)):
        if words == "/exit":
            break
        if words == "/reset":
            conversation.reset()
            console.print("forgotten", style="dim")
            continue
        if words.startswith("/"):
            console.print(f"no command {words}: {_HELP}", style="dim", markup=False)
            continue
        try:
            prompt_ids, num_dropped = conversation.ask(words)
        except InvalidOptionError as error:
            console.print(str(error), style="dim", markup=False)
            continue
        if num_dropped:
            console.print(f"({num_dropped} earlier exchanges no longer fit and are forgotten)", style="dim")
        said: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the answer, not the conversation
            for piece in session.answer(prompt_ids, max_new_tokens=max_new_tokens, seed=seed + turn):
                said.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        conversation.answer("".join(said))
        if stats and (speed := session.speed(with_bandwidth=True)) is not None:
            console.print(speed.line(), style="dim", markup=False, soft_wrap=True)


def _lines(*, interactive: bool) -> Iterator[str]:
    """What the user types, a line at a time, blank ones left out; ends with Ctrl-D or the end of the pipe."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines and remembers them)
    while True:
        try:
            line = input("› ") if interactive else sys.stdin.readline()
        except EOFError:
            sys.stdout.write("\n")
            return
        if not line and not interactive:
            return
        if line.strip():
            yield line.strip()
