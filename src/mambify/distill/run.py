"""Runs a recipe's stages in one directory, from wherever an earlier run of the same recipe stopped.

RUN/recipe.yaml          the recipe with every default written out
RUN/environment.json     versions, device, command
RUN/inputs.json          hashes of teacher, base and text: what a run goes on with must be what it began with
RUN/metrics.jsonl        one line a log event, all stages
RUN/stages/01-align/     checkpoints, TensorBoard events; trained.safetensors and summary.json once done
RUN/student/             the final model

Of several processes only the first writes here; the others read, so that all of them can continue a run.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import set_seed

from mambify.conversion import CALIBRATION_TOKENS, apply_plan, calibrate, needs_text, plan
from mambify.distill.arguments import item_tokens, training_arguments, use_bfloat16, why_no_graphs
from mambify.distill.checkpoints import (
    copy_trained,
    last_complete_checkpoint,
    load_trained,
    save_trained,
    trained_parameters,
)
from mambify.distill.logs import Listener, MetricsLog, forget_after
from mambify.distill.parallel import Processes
from mambify.distill.provenance import provenance_of
from mambify.distill.recipe import Recipe, dump_recipe, parse_recipe
from mambify.distill.rounds import FOLDER as ROUNDS
from mambify.distill.rounds import Rounds, Writer, round_seed, round_sizes
from mambify.distill.sections import sources_of
from mambify.distill.settings import Align, OnPolicy, Stage
from mambify.distill.sharding import lent, shard
from mambify.distill.stages import build_trainer, frozen_copy, stage_module, train_stage, unshare
from mambify.distill.steps import Step, steps_of
from mambify.errors import InvalidOptionError, OutputExistsError, RecipeError
from mambify.families.load import LoadedModel, save
from mambify.fingerprint import weights_fingerprint
from mambify.io import (
    append_jsonl,
    atomic_write_text,
    is_free,
    read_json,
    remove,
    require_apart,
    require_new,
    require_room,
    write_json,
)
from mambify.machine import environment
from mambify.model import HybridForCausalLM
from mambify.provenance import read_provenance

_TRAINED, _SUMMARY, _INPUTS = "trained.safetensors", "summary.json", "inputs.json"


def check_run(recipe: Recipe, *, overwrite: bool = False, save_to: Path | None = None) -> None:
    """Refuses a run directory that cannot be one, before anything is loaded or written.

    Args:
        overwrite: what is there will be removed, and what is at ``save_to``.

    Raises:
        OutputExistsError: something else is there, or something would be removed that the recipe reads.
        OutputWriteError: there can be no such directory.
    """
    run = Path(recipe.output)
    if overwrite:
        texts = [text for stage in recipe.stages for text in sources_of(recipe.data_of(stage))]
        for path in (run, run if save_to is None else save_to):
            require_new(path, overwrite=True)
            for source in filter(None, (recipe.teacher, recipe.student.base, *texts)):
                require_apart(path, source)
        return
    existing = run / "recipe.yaml"
    if existing.is_file():
        if _as_now_written(existing.read_text(encoding="utf-8")) != dump_recipe(recipe):
            raise OutputExistsError(f"{run} holds a run of another recipe: choose another output or pass --overwrite")
    elif not is_free(run):
        raise OutputExistsError(f"{run} is not empty and no run: choose another output")
    if save_to is not None and not is_free(save_to) and not _is_student_of(save_to, recipe):
        raise OutputExistsError(
            f"{save_to} is not empty and no student of this recipe: choose another path or pass --overwrite"
        )
    require_room(run)


def inputs_of(teacher: LoadedModel, base: LoadedModel, texts: Sequence[str | None]) -> dict[str, Any]:
    """Hashes of what a run reads; of the text of every stage, given here, ``None`` where there is none."""
    weights = weights_fingerprint(teacher.model)
    of_base = weights if base.model is teacher.model else weights_fingerprint(base.model)
    return {"teacher": weights, "base": of_base, "texts": list(texts)}


def open_run(
    recipe: Recipe,
    processes: Processes,
    *,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
    save_to: Path | None = None,
) -> Path:
    """The run directory, new or that of an earlier run of the same recipe; see :func:`check_run`.

    Args:
        inputs: what :func:`inputs_of` gave.

    Raises:
        InvalidOptionError: the earlier run read something else.
    """
    processes.first_does(lambda: _open_run(recipe, processes, inputs, overwrite=overwrite, save_to=save_to))
    return Path(recipe.output)


def _open_run(
    recipe: Recipe, processes: Processes, inputs: Mapping[str, Any], *, overwrite: bool, save_to: Path | None
) -> None:
    check_run(recipe, overwrite=overwrite, save_to=save_to)
    run = Path(recipe.output)
    if overwrite:
        remove(run)
        if save_to is not None:
            remove(save_to)
    if not (run / "recipe.yaml").is_file():
        atomic_write_text(run / "recipe.yaml", dump_recipe(recipe))
        called = {"command": sys.argv} | environment(processes.device) | {"processes": processes.count}
        write_json(run / "environment.json", called)
    _require_same(inputs, run)


def _require_same(inputs: Mapping[str, Any], run: Path) -> None:
    """Checks that a run is continued with what it began with; a run of an earlier version says nothing of that."""
    path = run / _INPUTS
    if not path.is_file():
        write_json(path, inputs)
        return
    before = read_json(path)
    changed = [name for name, found in inputs.items() if before.get(name) != found]
    if changed:
        names = " and ".join(changed)
        raise InvalidOptionError(
            f"{run} was begun with other {names} under the same name: put back what it was, choose another output, or "
            "pass --overwrite"
        )


def _is_student_of(path: Path, recipe: Recipe) -> bool:
    """Whether a run of this recipe, wherever it was, has saved its student at ``path``."""
    found = read_provenance(path)
    if found is None:
        return False
    return _as_now_written(yaml.safe_dump({**found.recipe, "output": recipe.output})) == dump_recipe(recipe)


def _as_now_written(text: str) -> str:
    """A recipe that was written out earlier, with the defaults of keys that did not exist then."""
    try:
        return dump_recipe(parse_recipe(yaml.safe_load(text)))
    except (RecipeError, yaml.YAMLError):
        return text


def run_stages(
    recipe: Recipe,
    run: Path,
    *,
    teacher: LoadedModel,
    base: LoadedModel | None = None,
    dataset: Callable[[Stage], Dataset[Any] | None],
    writer: Writer | None = None,
    processes: Processes,
    save_to: Path | None = None,
    listener: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> HybridForCausalLM:
    """Converts and trains through every stage, skipping those that are done; saves and returns the student.

    What is frozen is computed in the recipe's precision; where that is not a model's own dtype, a copy in it is made
    for the run, and the student that is saved keeps the weights as they were.

    Args:
        run: what :func:`open_run` gave.
        teacher: anywhere; it is only read.
        base: the model that is converted, where it is not the teacher; of the same vocabulary, only read as well.
        dataset: a stage's text: blocks, or pairs of them for preferences, of its context length. ``None`` where an
            on-policy stage takes no text but the student's.
        writer: has the student write texts, for on-policy stages.
        processes: those that share the work, and where this one trains.
        save_to: where the student is saved; the run's ``student`` folder by default.
        listener: told of every step, in the first process.
        announce: told in words how each stage runs, in the first process.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        OutputWriteError: the disk refused a write; what was written before is whole.
    """
    base = teacher if base is None else base
    bfloat16 = use_bfloat16(recipe.precision, processes.device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    working, origin = _both_in_dtype(teacher.model, base.model, dtype, processes.home)
    say = announce or (lambda _: None)
    work = _Work(recipe, run, working, origin, dataset, writer, processes, bfloat16, listener, say)
    steps = steps_of(recipe, base.model.config)
    student, reached = origin, None
    fresh: set[int] = set()  # converted, and not trained by any stage yet
    for step in steps:
        if step.attention_layers != reached:
            before = set(student.config.converted_layers)
            student, reached = _converted(student, recipe, step, work), step.attention_layers
            fresh = set(student.config.converted_layers) - before
        _run_step(work, step, student, fresh)
        fresh = set()
    final = _final_student(recipe, base.model, steps[-1], student)
    for model in (teacher.model, base.model):
        model.requires_grad_(True)
    processes.first_does(lambda: _save_student(final, save_to or run / "student", base, run))
    return final


@dataclass(frozen=True)
class _Work:
    """What all steps of a run have in common: teacher and base as they compute, and the arguments of the run."""

    recipe: Recipe
    run: Path
    teacher: HybridForCausalLM
    base: HybridForCausalLM
    dataset: Callable[[Stage], Dataset[Any] | None]
    writer: Writer | None
    processes: Processes
    bfloat16: bool
    listener: Listener | None
    announce: Callable[[str], None]


def _save_student(student: HybridForCausalLM, path: Path, base: LoadedModel, run: Path) -> None:
    """Saves what came of the run, if that is not what is there already."""
    provenance = provenance_of(run, summaries(run))
    found = read_provenance(path)
    if found is None or [*found.stages] != [*provenance.stages]:
        save(student, path, tokenizer=base.tokenizer, provenance=provenance, overwrite=found is not None)


def in_dtype(model: HybridForCausalLM, dtype: torch.dtype, device: str) -> HybridForCausalLM:
    """``model`` itself where it has this dtype and place already, else a copy."""
    return model if _is_in_dtype(model, dtype, device) else copy.deepcopy(model).to(device=device, dtype=dtype)


def _is_in_dtype(model: HybridForCausalLM, dtype: torch.dtype, device: str) -> bool:
    return bool(model.dtype == dtype and model.device.type == torch.device(device).type)


def _both_in_dtype(
    teacher: HybridForCausalLM, base: HybridForCausalLM, dtype: torch.dtype, device: str
) -> tuple[HybridForCausalLM, HybridForCausalLM]:
    """As :func:`in_dtype`; what the two share, as a model and what was cut from it do, their copies share as well."""
    shared = base is not teacher and not {id(p) for p in teacher.parameters()}.isdisjoint(map(id, base.parameters()))
    if not shared:
        working = in_dtype(teacher, dtype, device)
        return working, working if base is teacher else in_dtype(base, dtype, device)
    if _is_in_dtype(teacher, dtype, device):
        return teacher, base
    working, origin = copy.deepcopy((teacher, base))
    return working.to(device=device, dtype=dtype), origin.to(device=device, dtype=dtype)


def _final_student(
    recipe: Recipe, base: HybridForCausalLM, last: Step, trained: HybridForCausalLM
) -> HybridForCausalLM:
    """The base's kept weights as they are, with what was trained put in: what a user gets."""
    final = _converted(base, recipe, last)
    for part in {part for stage in recipe.stages for part in stage.learning_rates}:
        unshare(final, base, part)
    kept = {p.data_ptr() for p in base.parameters()}
    source = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            if parameter.data_ptr() not in kept:
                parameter.copy_(source[name])
    final.requires_grad_(True)
    return final


def _converted(model: HybridForCausalLM, recipe: Recipe, step: Step, work: _Work | None = None) -> HybridForCausalLM:
    """A student around ``model``'s weights, with attention in the layers of this step only.

    An initialisation that is measured on text is measured on the training text of the step in ``work``, through its
    base; without it the mixers' values do not matter, for they are about to be replaced.
    """
    init = "identity" if work is None else recipe.student.init
    planned = plan(
        model.config,
        mixer=recipe.student.mixer,
        attention_layers=step.attention_layers,
        init=init,
    )
    if work is None or not needs_text(init):
        return apply_plan(model, planned, seed=recipe.seed)
    text = work.dataset(step.stage)
    if text is None:
        raise RecipeError(f"stage {step.stage.kind} has no text that initialisation '{init}' could be measured on")
    blocks = calibration_blocks(text, CALIBRATION_TOKENS)
    return apply_plan(model, planned, seed=recipe.seed, calibration=blocks, measured_on=work.base)


def _run_step(work: _Work, step: Step, student: HybridForCausalLM, fresh: Collection[int]) -> None:
    """One stage, or the weights that it left when it was done before; it may be the first for ``fresh`` layers."""
    recipe, processes = work.recipe, work.processes
    set_seed(recipe.seed)
    directory = work.run / "stages" / step.name
    module = stage_module(step.stage, student, work.teacher, work.base)
    if processes.first_does(lambda: (directory / _SUMMARY).is_file()):
        processes.all_do(lambda: load_trained(module, directory / _TRAINED))
        return
    arguments = training_arguments(step.stage, recipe, directory, device=processes.device, count=processes.count)
    start = time.perf_counter()
    begun = processes.first_does(lambda: last_complete_checkpoint(directory) is not None)
    if isinstance(step.stage, Align) and not begun:
        _calibrate(work, student, step.stage, step.name, sorted(fresh))
    processes.share(trained_parameters(module).values())
    training = module if processes.sharding is None else shard(module, processes, bfloat16=work.bfloat16)

    step_items = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes.count
    tokens_per_step = step_items * item_tokens(step.stage, recipe)
    no_graphs = why_no_graphs(recipe, step.stage, processes)
    how = {"processes": processes.count, "sharded": processes.sharding is not None, "cuda_graphs": no_graphs is None}
    log = MetricsLog(work.run / "metrics.jsonl", step.name, tokens_per_step, work.listener)
    if processes.first:
        graphs = "recorded as a CUDA graph" if no_graphs is None else f"not recorded as a CUDA graph ({no_graphs})"
        work.announce(f"{step.name}: {processes.describe()}; each step {graphs}")
    trainer = build_trainer(
        step.stage,
        recipe,
        training,
        arguments,
        _dataset(work, step.stage, student, directory, arguments.max_steps, step_items),
        [log] if processes.first else [],
        processes=processes,
        cuda_graphs=no_graphs is None,
    )
    train_stage(trainer)
    seconds = time.perf_counter() - start
    if training is not module:
        copy_trained(training, module, processes.device)
    save_trained(module, directory / _TRAINED, processes)
    steps = trainer.state.global_step
    summary = {"stage": step.name, "steps": steps, "tokens": steps * tokens_per_step, "seconds": round(seconds, 2)}

    def conclude() -> None:
        write_json(directory / _SUMMARY, summary | {"attention": step.attention} | how)
        for left in (*directory.glob("checkpoint-*"), *directory.glob(ROUNDS)):
            shutil.rmtree(left)

    processes.first_does(conclude)


def _dataset(
    work: _Work, stage: Stage, student: HybridForCausalLM, directory: Path, num_steps: int, step_items: int
) -> Dataset[Any]:
    """What the stage trains on: given text, or what the student writes as it goes."""
    given = work.dataset(stage)
    if not isinstance(stage, OnPolicy):
        assert given is not None
        return given
    writer = work.writer
    assert writer is not None
    seed, dtype = work.recipe.seed, torch.bfloat16 if work.bfloat16 else torch.float32

    def write(number: int, count: int) -> dict[str, torch.Tensor]:
        return writer(stage, frozen_copy(student, dtype), round_seed(seed, number), count)

    per_round, written = round_sizes(stage, item_tokens(stage, work.recipe), step_items)
    return Rounds(
        write,
        given,
        num_items=num_steps * step_items,
        per_round=per_round,
        written=written,
        seed=seed,
        directory=directory,
        processes=work.processes,
    )


def calibration_blocks(text: Dataset[Any], num_tokens: int) -> torch.Tensor:
    """The first blocks of a text ``[N, T]`` that hold this many tokens."""
    count = min(-(-num_tokens // len(text[0]["input_ids"])), len(text))  # type: ignore[arg-type]
    return torch.stack([text[i]["input_ids"] for i in range(count)])


def _calibrate(work: _Work, student: HybridForCausalLM, stage: Align, name: str, layers: Sequence[int]) -> None:
    """The align stage's closed-form start of ``layers``; its errors go to the metrics as step 0."""
    if not stage.calibration_tokens or not layers:
        return
    text = work.dataset(stage)
    assert text is not None
    blocks = calibration_blocks(text, stage.calibration_tokens).to(work.processes.device)
    with _within_reach(student, work.base, work.processes):
        errors = calibrate(student, work.base, blocks.split(8), layers=layers)
    rows = []
    for step, column in ((-1, 0), (0, 1)):
        row = {f"layer_{i:02d}": error[column] for i, error in errors.items()}
        rows.append({"stage": name, "step": step, "tokens": 0, "loss": sum(row.values()) / len(row)} | row)

    def write() -> None:
        path = work.run / "metrics.jsonl"
        forget_after(path, name, -1)
        for row in rows:
            append_jsonl(path, row)

    work.processes.first_does(write)


@contextmanager
def _within_reach(student: HybridForCausalLM, base: HybridForCausalLM, processes: Processes) -> Iterator[None]:
    """While open, models in host memory compute on the device: the base part by part, the new mixers at once."""
    if processes.home == processes.device:
        yield
        return
    parts = [child for block in base.model.layers for child in block.children()]
    mixers = [student.model.layers[i].mixer for i in student.config.converted_layers]
    for mixer in mixers:
        mixer.to(processes.device)
    try:
        with lent([base.model.embed_tokens, *parts], processes.device):
            yield
    finally:
        for mixer in mixers:
            mixer.to(processes.home)


def summaries(run: Path) -> list[dict[str, Any]]:
    """What each finished stage took: steps, tokens, seconds."""
    return [read_json(path) for path in sorted(run.glob(f"stages/*/{_SUMMARY}"))]
