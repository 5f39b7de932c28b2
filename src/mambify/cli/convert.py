"""``mambify convert``: a teacher's attention layers into Mamba mixers, saved as a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mambify.cli import options
from mambify.cli.console import print_json, quiet_libraries, stdout, working
from mambify.errors import InvalidOptionError, UnknownSourceError
from mambify.io import require_apart, require_new

EXAMPLE = "mambify convert smollm2 --attention 0.5 --out student"


def convert(
    teacher: options.Teacher,
    out: Annotated[Path | None, typer.Option(help="Directory for the student; not needed with --dry-run.")] = None,
    mixer: Annotated[str, typer.Option(help="What replaces attention: mamba2 or mamba1.")] = "mamba2",
    attention: Annotated[float, typer.Option(help="Share of the layers that keep attention.")] = 0.5,
    attention_layers: Annotated[
        str | None, typer.Option(help="The layers that keep attention instead: 1,3,5 or 0-3,7 or none.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="How a mixer starts from attention: identity, paper, or one that is measured on text.")
    ] = "identity",
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text or synthesized directory that a measured --init is fitted to.")
    ] = None,
    calibration_tokens: Annotated[str, typer.Option(help="How much of it: 16k.")] = "16k",
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Turn a teacher into a student and save it.

    A fresh student is only a start: it speaks well after `mambify distill`.
    """
    layers = options.parse_layers(attention_layers)
    if out is None and not dry_run:
        raise InvalidOptionError("say where the student goes: --out DIR (or --dry-run for the plan alone)")
    if out is not None and not dry_run:
        require_new(out, overwrite=overwrite)
        require_apart(out, teacher)
    quiet_libraries()
    from mambify.cli.plans import describe_plan
    from mambify.conversion import apply_plan, needs_text, plan, require_text
    from mambify.data.calibration import calibration_blocks, calibration_documents
    from mambify.families.load import as_dtype, load, load_config, load_tokenizer, save

    config = load_config(teacher)
    config.dtype = as_dtype(dtype) or config.dtype
    # Before any weight is read: what cannot be is known at once.
    planned = plan(config, mixer=mixer, attention=attention, attention_layers=layers, init=init)
    num_tokens = options.parse_tokens(calibration_tokens)
    if not dry_run:
        require_text(init, given=calibration_text is not None)
    if calibration_text is not None and not needs_text(init):
        raise InvalidOptionError(f"--calibration-text is for an init that is measured: {init} is not")
    blocks = None
    if calibration_text is not None and not dry_run:
        tokenizer = load_tokenizer(teacher)
        if tokenizer is None:
            raise UnknownSourceError(f"{teacher} has no tokenizer, and --calibration-text needs one")
        documents = calibration_documents(calibration_text, tokenizer, num_tokens=num_tokens)
        blocks = calibration_blocks(documents, num_tokens=num_tokens)
    result: dict[str, Any] = {"teacher": teacher, "mixer": mixer} | describe_plan(planned)
    if not json:
        _show(result)
    if not dry_run and out is not None:
        with working(f"loading {teacher}", quiet=json):
            loaded = load(teacher, dtype=dtype)
        with working("converting and saving", quiet=json):
            student = apply_plan(loaded.model, planned, seed=seed, release=True, calibration=blocks)
            save(student, out, tokenizer=loaded.tokenizer, overwrite=overwrite)
        result["out"] = str(out)
        if not json:
            stdout().print(f"student saved in {out}", markup=False)
    if json:
        print_json(result)


def _show(result: dict[str, Any]) -> None:
    from mambify.cli.plans import bytes_table, facts_table, layer_map
    from mambify.evaluate.report.quantities import compact
    from mambify.layer_map import ranges

    count = result["parameters"]
    table = facts_table()
    table.add_row("teacher", f"{result['teacher']}, {compact(result['teacher_parameters'])} parameters")
    table.add_row("layers", layer_map(result["layers"]))
    table.add_row("attention in", ranges(result["attention_layers"]))
    table.add_row("converted", f"{ranges(result['converted_layers'])} to {result['mixer']}, start: {result['init']}")
    table.add_row("parameters", f"{compact(count['total'])} ({result['dtype']})")
    table.add_row("  kept", compact(count["kept"]))
    table.add_row("  new", compact(count["new"]))
    table.add_row("  trained", f"{compact(count['trained'])} (a recipe may train the MLPs as well)")
    console = stdout()
    console.print(table)
    console.print(bytes_table(result["state_bytes"], result["teacher_state_bytes"]))
