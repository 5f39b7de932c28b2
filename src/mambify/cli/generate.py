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

EXAMPLE = 'mambify generate smollm2 "Why is the sky blue?" --max-new-tokens 100'


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to answer or continue; - reads it from stdin.")],
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    draft: options.Draft = None,
    num_draft_tokens: options.NumDraftTokens = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt through the chat template where there is one.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    stats: options.Stats = False,
    json: options.Json = False,
) -> None:
    """Answer a prompt, streaming.

    With --draft the same tokens come faster: a draft puts tokens forward and the model reads them all at once.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    quiet_libraries()
    from mambify.decode import Sampling, Session, encode_prompt, stop_strings
    from mambify.decode.rows import require_count, require_positions
    from mambify.engine import rounded_shares
    from mambify.families.load import load, require_tokenizer

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    require_count(max_new_tokens)
    strings = stop_strings(stop)
    counts = options.parse_draft_counts(num_draft_tokens, draft)
    place = options.pick_device(device)
    with working(f"loading {model}", quiet=json):
        loaded = load(model, dtype=dtype, device=place)
    tokenizer = require_tokenizer(loaded)
    asked = _as_asked(tokenizer, prompt, chat=chat, system=system)
    prompt_ids = encode_prompt(tokenizer, asked)
    require_positions(loaded.model, len(prompt_ids), max_new_tokens)
    session = Session(
        loaded.model,
        tokenizer,
        sampling,
        max_length=len(prompt_ids) + max_new_tokens,
        first=len(prompt_ids) + max_new_tokens,
        draft=options.load_draft(draft, target=loaded, device=place, quiet=json),
        num_draft_tokens=counts,
        stop=strings,
    )
    start = time.perf_counter()
    stream = session.answer(prompt_ids, max_new_tokens=max_new_tokens, seed=seed)
    pieces: list[str] = []
    for piece in stream:
        pieces.append(piece)
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    if not json:
        sys.stdout.write("\n")
        speed = session.speed(with_bandwidth=stats) if stats or draft is not None else None
        if speed is not None:
            stderr().print(speed.line(), style="dim", markup=False, soft_wrap=True)
        return
    speed = session.speed(with_bandwidth=stats)
    result: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "chat": not isinstance(asked, str),
        "text": "".join(pieces),
        "num_prompt_tokens": len(prompt_ids),
        "num_new_tokens": stream.num_tokens,
        "ended": stream.ended,
        "stop": stream.stop,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(stream.num_tokens / seconds, 2),
    }
    if speed is not None:
        result |= speed.facts()
        if draft is not None:
            result["speculation"] = {
                "draft": draft,
                "num_draft_tokens": counts,
                "rounds_by_num_draft_tokens": speed.drafted,
                "tokens_per_round": round(speed.tokens_per_round, 3),
                "acceptance_by_position": rounded_shares(speed.acceptance_by_position),
            }
    print_json(result)


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
