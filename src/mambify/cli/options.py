"""Options that several commands have, under one name and one meaning; and the choice of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mambify.errors import InvalidOptionError, UnknownSourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mambify.families.load import LoadedModel

Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="Hub id, directory, file.gguf, or an alias: smollm2.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A student's directory, or anything a teacher may be.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; the GPU where there is one by default.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output path.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length limit of the answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token; 1: the model's own distribution.")]
TopK = Annotated[int, typer.Option(help="Draw among this many likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that hold this probability; 1 for all.")]
MinP = Annotated[
    float, typer.Option(help="Draw among tokens at least this times as likely as the likeliest; 0 for all.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens that occurred, in the prompt too, become less likely; 1 for none.")
]
Stop = Annotated[
    list[str] | None, typer.Option(help=r"A string at which the answer ends, without it; several may be given.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Say at the end how fast it was, of what the device can do.")]
Draft = Annotated[
    str | None,
    typer.Option(
        help="A smaller model that guesses ahead; lookup: from the text so far; cut:2: two layers of the model itself."
    ),
]
NumDraftTokens = Annotated[
    str | None,
    typer.Option(help="How many tokens are guessed at a time, 1 to 16, else 4; 2-6 or auto: as many as pay."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything drawn at random.")]


def pick_device(name: str | None) -> str:
    """``name``, or without one the GPU where there is one, else the CPU.

    A GPU that is named by number becomes the current one: kernels and recorded graphs go where that is.

    Raises:
        InvalidOptionError: no such device on this machine.
    """
    import torch

    from mambify.machine import default_device, require_device

    if name is None:
        return default_device()
    device = require_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return name


def load_draft(name: str | None, *, target: LoadedModel, device: str, quiet: bool = False) -> Any:
    """The model that ``--draft`` names, in the target's dtype; ``"lookup"``, ``"cut:2"`` and ``None`` as they are.

    What it has of the target is in memory once.

    Raises:
        UnknownSourceError: there is no such model.
        InvalidOptionError: its vocabulary is of another size than the target's.
        TokenizerMismatchError: its tokenizer gives other ids than the target's.
    """
    from mambify.cli.console import working
    from mambify.decode.drafts import is_made_of_target, share_with_target
    from mambify.engine import require_suitable_draft
    from mambify.families.load import load
    from mambify.tokenization import require_same_tokenizer

    if name is None or is_made_of_target(name):
        return name
    try:
        with working(f"loading {name}", quiet=quiet):
            loaded = load(name, dtype=target.model.dtype, device=device)
    except UnknownSourceError as error:
        raise UnknownSourceError(f"{error} (a draft may also be lookup or cut:2)") from error
    require_suitable_draft(target.model.config, loaded.model.config)
    if target.tokenizer is not None and loaded.tokenizer is not None:
        require_same_tokenizer(target.tokenizer, loaded.tokenizer, names=("target", "draft"))
    share_with_target(loaded.model, target.model)
    return loaded.model


def parse_draft_counts(text: str | None, draft: str | None) -> int | tuple[int, int] | str:
    """``"4"`` → 4, ``"2-6"`` → (2, 6), ``"auto"`` as it is; 4 where nothing is said.

    Raises:
        InvalidOptionError: anything else, a number out of range, or one without ``draft``.
    """
    from mambify.engine.pace import draft_counts

    if text is None:
        return 4
    if draft is None:
        raise InvalidOptionError("--num-draft-tokens is for drafts: give --draft DRAFT (or lookup, or cut:2) too")
    first, dash, last = text.partition("-")
    if text != "auto" and not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise InvalidOptionError(f"--num-draft-tokens '{text}' is no number of tokens: write it like 4, 2-6 or auto")
    counts = text if text == "auto" else (int(first), int(last)) if dash else int(first)
    draft_counts(counts)
    return counts


def parse_tokens(text: str) -> int:
    """``"16k"`` → 16000; ``"20M"``, ``"1B"`` and plain numbers likewise.

    Raises:
        InvalidOptionError: no such number, or none above 0.
    """
    from mambify.distill.recipe import parse_count

    count = parse_count(text)
    if not isinstance(count, int) or count < 1:
        raise InvalidOptionError(f"'{text}' is no number of tokens: write it like 500k, 20M or 1B")
    return count


def require_positive(option: str, value: int) -> None:
    """Raises InvalidOptionError for a number below 1."""
    if value < 1:
        raise InvalidOptionError(f"{option} must be at least 1, not {value}")


def parse_layers(text: str | None) -> Sequence[int] | None:
    """``"1,3,5-7"`` → 1, 3, 5, 6, 7; ``"none"`` → no layer.

    Raises:
        InvalidOptionError: anything else.
    """
    if text is None:
        return None
    if text.strip() == "none":
        return []
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise InvalidOptionError(f"'{text}' is no list of layers: write it like 1,3,5 or 0-3,7 or none")
        layers += range(int(first), int(last or first) + 1)
    return layers
