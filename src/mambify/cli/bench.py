"""``mambify bench``: runs a benchmark on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mambify.cli import experiments, options
from mambify.cli.console import (
    announcer,
    print_json,
    print_table,
    progress_bar,
    quiet_libraries,
    require_writable_file,
    stdout,
)
from mambify.errors import InvalidOptionError, MambifyError
from mambify.io import write_json

EXAMPLE = "mambify bench ops --json benchmarks/ops.json"
_STDOUT = Path("-")


def bench(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="ops, train, synthesize, inits, decode, export, verify, speculate, laws, or all; recipes; "
            "paper-table-6, -7, -8, -9.",
        ),
    ],
    only: Annotated[
        str | None,
        typer.Option(help="A part: an operation (ops), curve (train), way (synthesize), initialisation (inits), part."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="To train each student on: 1M; several in recipes: 5M,20M; 0 in inits: none.")
    ] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Presets: paper,best; paper@45M has tokens of its own; tables take one.")
    ] = None,
    attention: Annotated[float | None, typer.Option(help="Share of layers that keep attention.")] = None,
    teacher: Annotated[str | None, typer.Option(help="What is distilled; smollm2 by default.")] = None,
    target: Annotated[str | None, typer.Option(help="Model to make faster (speculate, laws), or to export.")] = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="What drafts for it: a model, lookup or cut:2; repeat for several.")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Questions, as Spec-Bench's question.jsonl (speculate, laws).")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Synthesized text to train and be scored on; else sampled first.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A file to be scored on too; in inits, all that is learned and scored on.")
    ] = None,
    instruct: Annotated[str | None, typer.Option(help="Conversations to tune on (paper-table-6).")] = None,
    preferences: Annotated[str | None, typer.Option(help="Pairs of answers to tune on (paper-table-6).")] = None,
    heldout_preferences: Annotated[
        str | None, typer.Option(help="Pairs of answers to be scored on (paper-table-6).")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Tune this student and distil none (paper-table-6).")] = None,
    tuning_tokens: Annotated[
        str | None, typer.Option(help="Of SFT and of DPO; by default a tenth of --tokens (paper-table-6).")
    ] = None,
    tune: Annotated[
        list[str] | None, typer.Option(metavar="KIND.KEY=VALUE", help="Changes to SFT or DPO: dpo.beta=0.1.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks, of those that --data-dir has.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Files of zero-shot tasks, which are then run.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each task only so many questions; so many prompts (laws).")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer (laws).")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers drawn from a small vocabulary (laws).")] = None,
    out: Annotated[Path | None, typer.Option(help="Where runs are kept, by default runs/bench; rows of inits.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Runs at a time, one on each GPU.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Changes to every preset.")
    ] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens of a training step; 16384 by default.")] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens of a sequence; 512 by default.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Of each text at most about so many are scored.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn at random.")] = None,
    device: options.Device = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON; - is stdout.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this file (.svg, .png, .pdf).")] = None,
) -> None:
    """Measure speed on this machine, and what initialisations and recipes are worth.

    Every speed stands beside others' code for the same, and beside what the memory can do. recipes compares presets on
    equal tokens; paper-table-6 to -9 make the paper's tables again at small scale. Killed and started again, these go
    on where they were; what is trained once is not trained again.
    """
    given = {
        option: value
        for option, value in {
            "only": only,
            "tokens": tokens,
            "recipes": recipes,
            "attention": attention,
            "teacher": teacher,
            "target": target,
            "draft": draft,
            "prompts": prompts,
            "data": data,
            "text": text,
            "instruct": instruct,
            "preferences": preferences,
            "heldout_preferences": heldout_preferences,
            "student": student,
            "tuning_tokens": tuning_tokens,
            "tuning": tune,
            "tasks": tasks,
            "data_dir": data_dir,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "samples": samples,
            "out": out,
            "parallel": parallel,
            "changes": change,
            "batch_tokens": batch_tokens,
            "context_length": context_length,
            "max_tokens": max_tokens,
            "seed": seed,
        }.items()
        if value is not None
    }
    if json is not None and json != _STDOUT:
        require_writable_file(json)
    quiet_libraries()
    from mambify.bench.plot import require_matplotlib
    from mambify.bench.registry import BENCHMARKS, names_of
    from mambify.distill.parallel import process_count
    from mambify.experiments.registry import EXPERIMENTS

    if process_count() > 1 and name != "train":
        raise InvalidOptionError("only 'bench train' runs in several processes")
    names = names_of(name)
    if plot is not None:
        if len(names) > 1:
            raise InvalidOptionError("--plot draws one benchmark: name it instead of 'all'")
        if plot.suffix not in (".svg", ".png", ".pdf"):
            raise InvalidOptionError(f"cannot draw into '{plot}': end its name in .svg, .png or .pdf")
        require_writable_file(plot)
        require_matplotlib()
    if only is not None and len(names) > 1:
        raise InvalidOptionError("--only names a part of one benchmark: name the benchmark instead of 'all'")
    taken = {each: ("only", *row.options) for each, row in BENCHMARKS.items()}
    for each in names:
        experiments.refuse_others(each, given, taken | {row: one.options for row, one in EXPERIMENTS.items()})
    if name in EXPERIMENTS:
        experiments.run(name, given, device=device, json=json, plot=plot)
    else:
        _measure(name, names, given, device=device, json=json, plot=plot)


def _measure(
    name: str, names: list[str], given: dict[str, Any], *, device: str | None, json: Path | None, plot: Path | None
) -> None:
    """Runs benchmarks of this machine, prints what they gave and writes it, after every row already.

    Raises:
        MambifyError: rows of our own code failed; all others have been written and printed then.
    """
    from mambify.bench.registry import BENCHMARKS, plot_benchmark, run_benchmark
    from mambify.distill.parallel import leave, process_rank

    quiet = json == _STDOUT
    said = {option: value for option, value in given.items() if option != "only"}
    if "text" in said:
        if len(said["text"]) > 1:
            raise InvalidOptionError(f"'{name}' takes one --text")
        (said["text"],) = said["text"]
    if "tokens" in said:
        said["tokens"] = 0 if said["tokens"].strip() == "0" else options.parse_tokens(said["tokens"])
    place = options.pick_device(device)
    results: list[dict[str, Any]] = []
    first = process_rank() == 0

    def whole(found: list[dict[str, Any]], **unfinished: bool) -> dict[str, Any]:
        return {**unfinished, "benchmarks": found} if name == "all" else found[0]

    def report(so_far: dict[str, Any]) -> None:
        if json is not None and not quiet and first:
            write_json(json, whole([*results, so_far], finished=False))

    with progress_bar(quiet=quiet or not first) as bars:
        say = announcer(quiet=not first, console=bars.console)
        for each in names:
            task = bars.add_task(each, total=None, note="")
            results.append(
                run_benchmark(
                    each,
                    device=place,
                    only=given.get("only"),
                    progress=lambda done, total, task=task: bars.update(task, completed=done, total=total),  # type: ignore[misc]
                    say=say,
                    report=report,
                    **said,
                )
            )
    leave()
    if not first:
        return
    if json is not None and not quiet:
        write_json(json, whole(results))
    if quiet:
        print_json(whole(results))
    else:
        for each, result in zip(names, results, strict=True):
            print_table(BENCHMARKS[each].table(result))
        if json is not None:
            stdout().print(f"figures written to {json}", markup=False)
    if plot is not None:
        plot_benchmark(results[0], plot)
    failed = sum(result.get("failed_rows", 0) for result in results)
    if failed:
        raise MambifyError(f"{failed} of {sum(len(result['results']) for result in results)} rows failed: see above")
