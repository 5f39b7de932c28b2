"""``mambify generate``: a model's answer to one prompt, streamed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import print_json, quiet_libraries, stderr, working
from mambify.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from mambify.decode.text import Message
    from mambify.engine import Statistics

EXAMPLE = 'mambify generate smollm2 "Why is the sky blue?" --max-new-tokens 100'


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to answer or continue; - reads it from stdin.")],
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    draft: options.Draft = None,
    num_draft_tokens: options.NumDraftTokens = "4",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt through the chat template where there is one.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Answer a prompt, streaming.

    With --draft the same tokens come faster: a draft puts tokens forward and the model reads them all at once.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    quiet_libraries()
    from mambify.decode import Sampling, encode_prompt, speculator, stop_ids, stream_text
    from mambify.families.load import load, require_tokenizer

    sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
    counts = options.parse_draft_counts(num_draft_tokens)
    place = options.pick_device(device)
    with working(f"loading {model}", quiet=json):
        loaded = load(model, dtype=dtype, device=place)
    tokenizer = require_tokenizer(loaded)
    asked = _as_asked(tokenizer, prompt, chat=chat, system=system)
    prompt_ids = encode_prompt(tokenizer, asked)
    decoder = None
    if draft is not None:
        decoder = speculator(
            loaded.model,
            options.load_draft(draft, loaded.model, device=place, quiet=json),
            sampling,
            max_length=len(prompt_ids) + max_new_tokens,
            stop_ids=sorted(stop_ids(loaded.model, tokenizer)),
            num_draft_tokens=counts,
        )
    start = time.perf_counter()
    stream = stream_text(loaded.model, tokenizer, prompt_ids, sampling, seed=seed, speculator=decoder)
    pieces: list[str] = []
    for piece in stream:
        pieces.append(piece)
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    if not json:
        sys.stdout.write("\n")
        if decoder is not None:
            stderr().print(speed_of(decoder.statistics, seconds), style="dim", markup=False)
        return
    result: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "chat": not isinstance(asked, str),
        "text": "".join(pieces),
        "num_prompt_tokens": len(prompt_ids),
        "num_new_tokens": stream.num_tokens,
        "ended": stream.ended,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(stream.num_tokens / seconds, 2),
    }
    if decoder is not None:
        found = decoder.statistics
        result["speculation"] = {
            "draft": draft,
            "num_draft_tokens": counts,
            "rounds_by_num_draft_tokens": found.rounds,
            "tokens_per_round": round(found.tokens_per_round, 3),
            "acceptance_by_position": [round(share, 4) for share in found.acceptance_by_position],
        }
    print_json(result)


def speed_of(statistics: Statistics, seconds: float) -> str:
    """One line on what speculation did."""
    shares = ", ".join(f"{share:.0%}" for share in statistics.acceptance_by_position)
    return (
        f"{statistics.tokens} tokens, {statistics.tokens / seconds:.1f} a second, {statistics.tokens_per_round:.2f} a "
        f"round; accepted by position: {shares}"
    )


def _as_asked(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, system: str | None
) -> str | Sequence[Message]:
    """The prompt as a conversation where the tokenizer knows how to write one, else as it stands."""
    if not chat or not tokenizer.chat_template:
        if system is not None:
            raise InvalidOptionError("--system needs a chat: this model has no chat template, or --no-chat was given")
        return prompt
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": prompt}]
