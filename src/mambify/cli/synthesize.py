"""``mambify synthesize``: text sampled from the teacher itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import announcer, print_json, progress_bar, quiet_libraries, stderr, stdout
from mambify.errors import InvalidOptionError
from mambify.io import require_new

EXAMPLE = "mambify synthesize smollm2 --tokens 20M --out data/smollm2"


def synthesize(
    teacher: options.Teacher,
    tokens: Annotated[str, typer.Option(help="About how many tokens in all: 500k, 20M, 1B.")],
    out: Annotated[Path, typer.Option(help="Directory for the text; what was begun there is continued.")],
    kind: Annotated[
        str, typer.Option(help="chat, text, mixed (half each), or auto: chat if there is a template.")
    ] = "auto",
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Questions to answer, in place of the teacher's own: .jsonl, .json or hf:name; repeatable."),
    ] = None,
    seed: options.Seed = 0,
    temperature: Annotated[float, typer.Option(help="1 is the teacher's own distribution.")] = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer or a plain text.")] = 256,
    max_user_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a user's turn; 128 by default, 512 of --prompts.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts sampled at a time; 64 by default, 1024 on a GPU.")
    ] = None,
    device: options.Device = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where the device is fast in it), float32, bfloat16 or float16.")
    ] = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Sample text from a teacher, to distil on.

    Killed and started again, the same command continues where it was.
    """
    if not (out / "manifest.json").is_file():
        require_new(out, overwrite=overwrite)
    quiet_libraries()
    from mambify.data.sampler import Settings
    from mambify.data.synthesize import synthesize as sample
    from mambify.distill.arguments import use_bfloat16
    from mambify.distill.recipe import parse_count
    from mambify.families.load import as_dtype, load, require_tokenizer

    num_tokens = parse_count(tokens)
    if not isinstance(num_tokens, int):
        raise InvalidOptionError(f"'{tokens}' is no number of tokens: write it like 500k, 20M or 1B")
    as_dtype(dtype)
    place = options.pick_device(device)
    on_gpu = place.startswith("cuda")
    if batch_size is None:
        batch_size = 1024 if on_gpu else 64
    if max_user_tokens is None:
        max_user_tokens = 512 if prompts else 128
    settings: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "max_user_tokens": max_user_tokens,
        "batch_size": batch_size,
        # The last texts of a shard leave slots empty, so shards are many times what is sampled at once.
        "documents_per_shard": 16 * batch_size if on_gpu else 512,
    }
    Settings(num_tokens, **settings)  # raises on a setting out of range before the teacher is loaded
    if dtype == "auto" and use_bfloat16("auto", place):
        dtype = "bfloat16"
    announcer(quiet=json)(f"loading {teacher}")
    loaded = load(teacher, dtype=dtype, device=place)
    with progress_bar(quiet=json) as progress:
        task = progress.add_task("sampling", total=num_tokens, note="tokens")
        manifest = sample(
            loaded.model,
            require_tokenizer(loaded),
            out,
            num_tokens=num_tokens,
            prompts=prompts or None,
            **settings,
            teacher=teacher,
            overwrite=overwrite,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    files = [file for shard in manifest.shards for file in shard.files]
    sides = {
        split: {
            "documents": sum(file.documents for file in files if file.split == split),
            "tokens": sum(file.tokens for file in files if file.split == split),
        }
        for split in ("train", "heldout")
    }
    if not sides["heldout"]["documents"]:
        stderr().print(
            f"{out}: nothing is held out of so little text, and `evaluate --data` needs that: ask for more --tokens",
            markup=False,
            soft_wrap=True,
        )
    if json:
        print_json({"out": str(out), "teacher": teacher, "num_tokens": manifest.num_tokens} | sides)
        return
    train, heldout = sides["train"], sides["heldout"]
    stdout().print(
        f"{out}: {train['tokens']:,} tokens in {train['documents']:,} documents to train on, "
        f"{heldout['tokens']:,} in {heldout['documents']:,} held out",
        markup=False,
    )
