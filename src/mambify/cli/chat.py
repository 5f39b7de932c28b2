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
    seed: options.Seed = 0,
    draft: options.Draft = None,
    num_draft_tokens: options.NumDraftTokens = "4",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Talk with a model in the terminal.

    /reset forgets the conversation; /exit or Ctrl-D ends it. Lines from a pipe are answered one by one.
    """
    quiet_libraries()
    from mambify.decode import Conversation, Sampling, speculator, stop_ids, stream_text
    from mambify.families.load import load, require_tokenizer

    sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
    counts = options.parse_draft_counts(num_draft_tokens)
    place = options.pick_device(device)
    with working(f"loading {model}"):
        loaded = load(model, dtype=dtype, device=place)
    tokenizer = require_tokenizer(loaded)
    if not tokenizer.chat_template:
        raise UnsupportedError(f"{model} has no chat template: use `mambify generate`, which continues plain text")
    limit = loaded.model.config.max_position_embeddings - max_new_tokens
    if limit < 1:
        reads = limit + max_new_tokens
        raise InvalidOptionError(
            f"--max-new-tokens {max_new_tokens} leaves no room: {model} reads {reads} tokens in all"
        )
    decoder = None
    if draft is not None:
        decoder = speculator(
            loaded.model,
            options.load_draft(draft, loaded.model, device=place),
            sampling,
            max_length=limit + max_new_tokens,
            stop_ids=sorted(stop_ids(loaded.model, tokenizer)),
            num_draft_tokens=counts,
        )
    conversation = Conversation(tokenizer, system=system, max_prompt_tokens=limit)
    console = stderr()
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
            stream = stream_text(loaded.model, tokenizer, prompt_ids, sampling, seed=seed + turn, speculator=decoder)
            for piece in stream:
                said.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        conversation.answer("".join(said))


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
