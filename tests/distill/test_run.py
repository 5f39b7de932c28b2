"""A whole run on a tiny teacher: what trains and what does not, resuming, and how it stops."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mambify
from mambify.distill import checkpoints as checkpoint_files
from mambify.distill.logs import read_metrics
from mambify.distill.recipe import Recipe, dump_recipe
from mambify.distill.run import summaries
from mambify.errors import (
    InvalidOptionError,
    OutputExistsError,
    OutputWriteError,
    RecipeError,
    TrainingDivergedError,
)
from mambify.workflows.distill import distill

MakeRecipe = Callable[..., Recipe]
STEP = 4 * 32


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def _align(steps: int, **changes: object) -> dict[str, object]:
    return {"kind": "align", "tokens": steps * STEP, "batch_tokens": STEP, **changes}


def _kd(steps: int, **changes: object) -> dict[str, object]:
    return {"kind": "kd", "tokens": steps * STEP, "batch_tokens": STEP, **changes}


def test_losses_fall_and_only_mixers_change(make_recipe: MakeRecipe, teacher_directory: Path) -> None:
    student, run = distill(make_recipe(stages=[_align(25, calibration_tokens=0), _kd(25)]), device="cpu")
    rows = read_metrics(run / "metrics.jsonl")
    for stage, name in (("01-align", "loss"), ("02-kd", "kl")):
        values = [row[name] for row in rows if row["stage"] == stage and row["step"] > 0]
        assert len(values) == 25
        assert sum(values[-5:]) < 0.9 * sum(values[:5])
    teacher = load_file(teacher_directory / "model.safetensors")
    for name, tensor in student.state_dict().items():
        converted = name.startswith(tuple(f"model.layers.{i}.mixer." for i in student.config.converted_layers))
        assert converted or torch.equal(tensor, teacher[name.replace(".mixer.", ".self_attn.")]), name
    assert [row["tokens"] for row in summaries(run)] == [25 * STEP, 25 * STEP]
    reloaded = mambify.load(run / "student").model
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), student.parameters(), strict=True))


def test_calibration_is_logged_and_lowers_the_error(make_recipe: MakeRecipe) -> None:
    _, run = distill(make_recipe(stages=[_align(1)]), device="cpu")
    rows = {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl")}
    assert rows[0] < rows[-1]
    assert rows[0] < 1.0


def test_the_last_step_is_logged_whatever_the_rhythm(make_recipe: MakeRecipe) -> None:
    _, run = distill(make_recipe(stages=[_align(3, calibration_tokens=0), _kd(5)], log_every=4), device="cpu")
    logged = [(row["stage"], row["step"]) for row in read_metrics(run / "metrics.jsonl")]
    assert logged == [("01-align", 3), ("02-kd", 4), ("02-kd", 5)]


def test_a_run_of_an_earlier_version_goes_on(make_recipe: MakeRecipe) -> None:
    """Its recipe was written out before there were drafts, and says nothing of them."""
    recipe = make_recipe(stages=[_align(1)])
    _, run = distill(recipe, device="cpu")
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    for key in ("layers", "spread", "vocabulary"):
        del written["student"][key]
    (run / "recipe.yaml").write_text(yaml.safe_dump(written))
    distill(recipe, device="cpu")
    with pytest.raises(OutputExistsError, match="another recipe"):
        distill(make_recipe(stages=[_align(1)], student={"layers": 2, "attention": 0.5}), device="cpu")


def test_layers_are_cut_before_they_are_converted(make_recipe: MakeRecipe) -> None:
    """Depth and attention fall together: two of four layers, one of which is converted and aligned."""
    student, _ = distill(make_recipe(student={"layers": [1, 3], "attention": 0.5}), device="cpu")
    assert student.config.layer_mixers == ["mamba2", "attention"] and student.config.cut_from == [1, 3]


def test_the_run_directory_tells_the_story(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(stages=[_align(2)])
    _, run = distill(recipe, device="cpu")
    assert (run / "recipe.yaml").read_text() == dump_recipe(recipe)
    assert json.loads((run / "environment.json").read_text())["torch"] == torch.__version__
    assert (run / "student" / "tokenizer.json").is_file()
    assert not list(run.glob("stages/*/checkpoint-*"))


def test_mlps_train_when_asked_and_the_teacher_stays(make_recipe: MakeRecipe, teacher_directory: Path) -> None:
    teacher = mambify.load(teacher_directory)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    student, _ = distill(make_recipe(stages=[_kd(3, mlp_learning_rate=1e-3)]), device="cpu", teacher=teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(student.state_dict()[name], before[name])


def test_cross_entropy_and_temperature_take_part(make_recipe: MakeRecipe) -> None:
    _, run = distill(make_recipe(stages=[_kd(2, ce_weight=1.0, kl_weight=0.1, temperature=2.0)]), device="cpu")
    row = read_metrics(run / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(0.1 * row["kl"] + row["ce"], rel=1e-4)


def test_accumulating_micro_batches_is_one_large_batch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = []
    for micro_batch in (4, 1):
        stages = [_align(2, micro_batch=micro_batch, clip=0), _kd(3, micro_batch=micro_batch, clip=0)]
        recipe = make_recipe(stages=stages, output=str(tmp_path / f"run-{micro_batch}"))
        runs.append(distill(recipe, device="cpu")[0].state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        stages = [_align(1), _kd(2, gradient_checkpointing=checkpointing)]
        recipe = make_recipe(stages=stages, output=str(tmp_path / f"run-{checkpointing}"))
        runs.append(distill(recipe, device="cpu")[0].state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=1e-5)


def test_packed_documents_train(make_recipe: MakeRecipe, text_file: Path) -> None:
    data = {"train": str(text_file), "context_length": 64, "packing": "documents"}
    student, _ = distill(make_recipe(data=data, stages=[_align(2), _kd(2)]), device="cpu")
    assert student.num_converted == 2


def test_mamba1_and_a_progressive_schedule(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"mixer": "mamba1", "attention": [0.75, 0.25]}, stages=[_align(2), _kd(2)])
    student, run = distill(recipe, device="cpu")
    assert student.config.converted_layers == [0, 1, 2]
    assert [row["attention"] for row in summaries(run)] == [0.75, 0.75, 0.25, 0.25]


def test_bfloat16_arithmetic_keeps_the_teachers_weights(make_recipe: MakeRecipe, teacher_directory: Path) -> None:
    student, _ = distill(make_recipe(precision="bfloat16", stages=[_align(2), _kd(2)]), device="cpu")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    teacher = load_file(teacher_directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(student.state_dict()[name], teacher[name])


# ---- resuming ------------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from mambify.distill.recipe import load_recipe
from mambify.workflows.distill import distill
distill(load_recipe(sys.argv[1]), device="cpu")
"""


def _start(recipe: Recipe, path: Path) -> subprocess.Popen[bytes]:
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(path)], stderr=subprocess.DEVNULL)


def test_killed_at_any_moment_the_same_command_ends_bit_identical(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SIGKILL in the first and in the second stage, then the same command: the weights of an uninterrupted run."""
    stages = [_align(8), _kd(8)]
    whole = make_recipe(stages=stages, output=str(tmp_path / "whole"))
    broken = make_recipe(stages=stages, output=str(tmp_path / "broken"))
    distill(whole, device="cpu")

    metrics = tmp_path / "broken" / "metrics.jsonl"
    for killed_at in (4, 13):
        process = _start(broken, tmp_path / "broken.yaml")
        deadline = time.monotonic() + 120
        while sum(row["step"] > 0 for row in read_metrics(metrics)) < killed_at:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "broken" / "student").exists()

    again = _start(broken, tmp_path / "broken.yaml")
    assert again.wait(timeout=120) == 0
    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "broken")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    steps = [(row["stage"], row["step"]) for row in read_metrics(metrics)]
    assert len(steps) == len(set(steps)), "a resumed run logged a step twice"


def test_a_half_written_checkpoint_is_not_resumed_from(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = make_recipe(output=str(tmp_path / "whole"))
    distill(whole, device="cpu")
    broken = make_recipe(output=str(tmp_path / "broken"))
    half = tmp_path / "broken" / "stages" / "01-align" / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "trained.safetensors").write_bytes(b"half of it")
    (tmp_path / "broken" / "recipe.yaml").write_text(dump_recipe(broken), encoding="utf-8")
    distill(broken, device="cpu")
    found = _weights(tmp_path / "broken")
    assert all(torch.equal(tensor, found[name]) for name, tensor in _weights(tmp_path / "whole").items())


def test_a_finished_run_is_not_run_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(stages=[_align(2)])
    _, run = distill(recipe, device="cpu")
    before = (run / "student" / "model.safetensors").stat().st_mtime_ns
    log = (run / "metrics.jsonl").read_text()
    distill(recipe, device="cpu")
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == before
    assert (run / "metrics.jsonl").read_text() == log


def test_another_recipe_does_not_continue_a_run(make_recipe: MakeRecipe) -> None:
    distill(make_recipe(stages=[_align(1)]), device="cpu")
    with pytest.raises(OutputExistsError, match="another recipe"):
        distill(make_recipe(stages=[_align(2)]), device="cpu")
    distill(make_recipe(stages=[_align(2)]), device="cpu", overwrite=True)


# ---- how it stops --------------------------------------------------------------------------------------------------


def test_a_diverging_loss_stops_and_keeps_the_last_good_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambify.distill.align import MixerAligner

    forward = MixerAligner.forward
    calls = 0

    def spoiled(self: MixerAligner, trace: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        error, energy = forward(self, trace)  # type: ignore[arg-type]
        return error * float("nan") if calls > 2 * 5 else error, energy

    monkeypatch.setattr(MixerAligner, "forward", spoiled)
    recipe = make_recipe(log_every=4)
    with pytest.raises(TrainingDivergedError, match="nan"):
        distill(recipe, device="cpu")
    checkpoints = sorted(path.name for path in Path(recipe.output).glob("stages/01-align/checkpoint-*"))
    assert checkpoints == ["checkpoint-3"]
    weights = load_file(Path(recipe.output) / "stages/01-align/checkpoint-3/trained.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())

    monkeypatch.setattr(MixerAligner, "forward", forward)
    distill(recipe, device="cpu")
    assert (Path(recipe.output) / "student").is_dir()


def test_a_full_disk_stops_with_earlier_checkpoints_intact(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = checkpoint_files.save_file, 0

    def full(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    recipe = make_recipe()
    with pytest.raises(OutputWriteError, match="No space left"):
        distill(recipe, device="cpu")
    kept = list(Path(recipe.output).glob("stages/01-align/checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-3"]
    assert (kept[0] / "complete").is_file()


def test_an_unknown_trainer_key_names_the_nearest(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="did you mean 'max_grad_norm'"):
        distill(make_recipe(stages=[_align(1, trainer={"max_grad_nrm": 1})]), device="cpu")


def test_converting_nothing_is_refused_before_anything_is_written(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"attention": 1.0})
    with pytest.raises(InvalidOptionError, match="nothing"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_the_student_tells_where_it_comes_from(make_recipe: MakeRecipe) -> None:
    _, run = distill(make_recipe(stages=[_align(2), _kd(3)]), device="cpu")
    provenance = mambify.load(run / "student").model.provenance
    assert provenance is not None
    assert provenance.tokens == 5 * STEP
    assert [stage["stage"] for stage in provenance.stages] == ["01-align", "02-kd"]
    assert provenance.recipe["stages"][0]["kind"] == "align"
    assert provenance.environment["torch"] == str(torch.__version__)
    card = (run / "student" / "README.md").read_text(encoding="utf-8")
    assert "| 02-kd |" in card
    assert f"In all {5 * STEP:,} tokens." in card
    record = (run / "student" / "provenance.json").read_text(encoding="utf-8")
    assert str(run) not in record  # where it was made is nobody's concern
    assert "command" not in json.loads(record)["environment"]


def test_text_and_weights_must_be_those_it_began_with(
    make_recipe: MakeRecipe, text_file: Path, teacher_directory: Path, tmp_path: Path
) -> None:
    text, teacher = tmp_path / "text.jsonl", tmp_path / "teacher"
    text.write_bytes(text_file.read_bytes())
    shutil.copytree(teacher_directory, teacher)
    recipe = make_recipe(stages=[_align(1)], teacher=str(teacher), data={"train": str(text), "context_length": 32})
    _, run = distill(recipe, device="cpu")
    text.write_bytes(text_file.read_bytes().replace(b"w1 ", b"w2 "))
    with pytest.raises(InvalidOptionError, match="begun with other texts under the same name"):
        distill(recipe, device="cpu")
    text.write_bytes(text_file.read_bytes())
    weights = {name: tensor + 1 for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidOptionError, match="other teacher and base"):
        distill(recipe, device="cpu")
    (run / "inputs.json").unlink()  # a run of an earlier version
    distill(recipe, device="cpu")


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "another student", "photos"])
def test_where_the_student_is_saved(make_recipe: MakeRecipe, tmp_path: Path, there: str) -> None:
    """Only what is free, or what this run has saved, is taken."""
    place = tmp_path / "place"
    if there == "another student":
        distill(make_recipe(stages=[_align(2)], output=str(tmp_path / "other")), device="cpu", save_to=place)
    elif there != "nothing":
        place.mkdir()
    if there == "photos":
        (place / "summer.jpg").write_text("sun")
    recipe = make_recipe(stages=[_align(1)])
    if there in ("photos", "another student"):
        before = sorted(place.iterdir())
        with pytest.raises(OutputExistsError, match="no student of this recipe"):
            distill(recipe, device="cpu", save_to=place)
        assert sorted(place.iterdir()) == before
        return
    student, _ = distill(recipe, device="cpu", save_to=place)
    written = (place / "model.safetensors").stat().st_mtime_ns
    reloaded = mambify.load(place).model
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), student.parameters(), strict=True))
    distill(recipe, device="cpu", save_to=place)
    assert (place / "model.safetensors").stat().st_mtime_ns == written


def test_only_layers_that_are_converted_now_are_calibrated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Those of a hybrid base keep what they have learned, and a run that is continued ends as if it had not stopped."""
    first = make_recipe(stages=[_align(3)], student={"attention": 0.5}, output=str(tmp_path / "first"))
    halfway, run = distill(first, device="cpu")
    base = str(run / "student")
    stages = [_align(2), _align(2)]
    recipe = make_recipe(stages=stages, student={"base": base, "attention": 0.0}, output=str(tmp_path / "second"))
    whole, run = distill(recipe, device="cpu")
    (errors,) = (row for row in read_metrics(run / "metrics.jsonl") if row["step"] == 0)
    assert errors["stage"] == "01-align"
    layers = {f"layer_{i:02d}" for i in halfway.config.attention_layers}
    assert {key for key in errors if key.startswith("layer_")} == layers
    for index in halfway.config.converted_layers:
        theirs = halfway.model.layers[index].mixer.state_dict()
        for name, tensor in whole.model.layers[index].mixer.state_dict().items():
            assert torch.equal(tensor, theirs[name])
    (run / "stages" / "02-align" / "summary.json").unlink()
    shutil.rmtree(run / "student")
    again, _ = distill(recipe, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
