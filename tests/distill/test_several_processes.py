"""Two processes do what one does: the same losses, gradients and weights, up to the order of floating-point sums.

All runs of two processes share one start of Python (the module's fixture), and break off, diverge and fill the disk in
it in turn; the tests look at what they left. Bit by bit equality is not claimed, and not there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import mambify
from mambify.distill.align import MixerAligner
from mambify.distill.arguments import why_no_graphs
from mambify.distill.batches import StepBatches
from mambify.distill.checkpoints import trained_parameters
from mambify.distill.logs import read_metrics
from mambify.distill.parallel import Processes, Sharding, joined
from mambify.distill.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from mambify.distill.sharding import lent
from mambify.distill.stages import stage_module
from mambify.distill.trainer import DistillationStage
from mambify.errors import InvalidOptionError, RecipeError, UnsupportedError
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.workflows.distill import distill

MakeRecipe = Callable[..., Recipe]
CONTEXT, SEQUENCES, STEPS = 32, 4, 6
CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))
ACCUMULATED = {"micro_batch": 1}


@dataclass(frozen=True)
class Runs:
    """What the two processes left.

    Attributes:
        path: holds a directory for each job, by its name.
        outcomes: job → what each process said of it.
        stdout: what both printed.
    """

    path: Path
    outcomes: dict[str, list[dict[str, Any]]]
    stdout: str

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.path / name / "metrics.jsonl")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / name / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def tuning(chat_teacher: Path, chat_file: Path, pairs_file: Path) -> dict[str, Any]:
    """A recipe of the stages beside align and kd, and of kd with all that may train before one with less."""
    stage = {"tokens": 3 * 4 * 64, "batch_tokens": 4 * 64, "ema": 0.5}
    return {
        "teacher": str(chat_teacher),
        "data": {"train": str(chat_file), "context_length": 64},
        "stages": [
            {"kind": "mixing", **stage},
            {"kind": "hidden", **stage},
            {"kind": "kd", "rest_learning_rate": 1e-4, "mlp_learning_rate": 1e-4, **stage},
            {"kind": "sft", "learning_rate": 1e-3, **stage},
            {"kind": "dpo", "learning_rate": 1e-3, "kl_weight": 0.1, "data": {"train": str(pairs_file)}, **stage},
            {"kind": "dpo", "reference": "student", "data": {"train": str(pairs_file)}, **stage},
        ],
    }


@pytest.fixture(scope="module")
def write_recipe(
    teacher_directory: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``write_recipe(name, **changes)``: a file; ``changes`` are of both stages, or of the recipe."""
    folder = tmp_path_factory.mktemp("several")

    def write(name: str, **changes: Any) -> Path:
        stage = {"tokens": STEPS * SEQUENCES * CONTEXT, "batch_tokens": SEQUENCES * CONTEXT}
        recipe = {
            "teacher": str(teacher_directory),
            "student": {"mixer": "mamba2", "attention": 0.5},
            "data": {"train": str(text_file), "context_length": CONTEXT},
            "output": str(folder / name),
            "precision": "float32",
            "log_every": 1,
            "checkpoint_every": 2,
            "report_to": [],
        }
        of_recipe = {key: value for key, value in changes.items() if key in Recipe.model_fields}
        stage |= {key: value for key, value in changes.items() if key not in of_recipe}
        stages = [{"kind": "align", **stage}, {"kind": "kd", "ce_weight": 0.1, **stage}]
        path = folder / f"{name}.yaml"
        path.write_text(dump_recipe(parse_recipe(recipe | {"stages": stages} | of_recipe)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def runs(write_recipe: Callable[..., Path], tuning: dict[str, Any]) -> Runs:
    """One start of two processes, after what one process did before them and before what one does after them."""
    jobs: dict[str, dict[str, Any]] = {
        "replicated": {"sharded": False},
        "sharded": {"sharded": True},
        "accumulated": {"sharded": False, "changes": ACCUMULATED},
        "mlps": {"sharded": True, "changes": {"stages": _kd_with_mlps()}},
        "tuned": {"sharded": False, "changes": tuning},
        "tuned-shards": {"sharded": True, "changes": tuning},
        "written": {"sharded": False, "changes": tuning | {"stages": _on_policy()}},
        "half-shards": {"sharded": True, "changes": tuning | {"precision": "bfloat16"}},
        "two-then-one": {"sharded": False, "break_off": ["02-kd", 3]},
        "shards-then-one": {"sharded": True, "break_off": ["01-align", 5]},
        "one-then-two": {"sharded": False},
        "one-then-shards": {"sharded": True},
        "diverging": {"sharded": False, "spoil": [1, "02-kd", 4]},
        "full-disk": {"sharded": False, "full_disk": 1},
    }
    recipes = {name: write_recipe(name, **job.pop("changes", {})) for name, job in jobs.items()}
    folder = recipes["replicated"].parent
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("one-then-two", ["01-align", 3]), ("one-then-shards", ["02-kd", 5])):
            _break_off(patch, recipes[name], place)
    script = [{"recipe": str(recipes[name]), **job} for name, job in jobs.items()]
    command = write_recipe("command", stages=[{"kind": "align", "tokens": 128, "batch_tokens": 128}])
    script.append({"command": ["distill", str(command), "--device", "cpu", "--json"]})
    said, stdout = _launch(folder / "jobs.json", script)
    outcomes = dict(zip([*jobs, "command"], said, strict=True))
    for name in ("two-then-one", "shards-then-one"):
        distill(load_recipe(recipes[name]), device="cpu")
    for name, changes in (
        ("one", {}),
        ("one-accumulated", {"micro_batch": 2}),
        ("one-mlps", {"stages": _kd_with_mlps()}),
        ("one-tuned", tuning),
        ("one-written", tuning | {"stages": _on_policy()}),
    ):
        distill(load_recipe(write_recipe(name, **changes)), device="cpu")
    return Runs(folder, outcomes, stdout)


def _launch(path: Path, script: list[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], str]:
    """What each of two processes says of each job, and what both print."""
    path.write_text(json.dumps(script), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("one_process.py")
    done = subprocess.run([*launch, str(worker), str(path)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads(path.with_suffix(f".{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return [list(outcome) for outcome in zip(*said, strict=True)], done.stdout


def _kd_with_mlps() -> list[dict[str, Any]]:
    stage = {"tokens": 3 * SEQUENCES * CONTEXT, "batch_tokens": SEQUENCES * CONTEXT}
    return [{"kind": "kd", "mlp_learning_rate": 1e-4, "gradient_checkpointing": True, **stage}]


def _on_policy() -> list[dict[str, Any]]:
    stage = {"tokens": 4 * 4 * 64, "batch_tokens": 4 * 64, "tokens_per_round": 4 * 4 * 64, "share": 0.75}
    return [{"kind": "on_policy", "max_new_tokens": 24, **stage}]


def _break_off(patch: pytest.MonkeyPatch, recipe: Path, place: list[Any]) -> None:
    from mambify.distill.trainer import StageTrainer

    step = StageTrainer.training_step

    def watched(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if [Path(self.args.output_dir).name, self.state.global_step] == place:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with patch.context() as inner:
        inner.setattr(StageTrainer, "training_step", watched)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(recipe), device="cpu")


def _same(runs: Runs, name: str, one: str = "one", loose: float = 1) -> None:
    """Same steps with the same losses and gradients (their norm before clipping), and in the end the same weights."""
    expected, found = runs.metrics(one), runs.metrics(name)
    assert [(r["stage"], r["step"]) for r in found] == [(r["stage"], r["step"]) for r in expected]
    for theirs, ours in zip(expected, found, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "kl", "layer_00", "layer_02"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3 * loose), (theirs["stage"], theirs["step"], key)
    weights = runs.weights(name)
    for key, tensor in runs.weights(one).items():
        torch.testing.assert_close(weights[key], tensor, rtol=0, atol=5e-4 * loose, msg=key)


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_two_processes_are_one(runs: Runs, name: str) -> None:
    assert [outcome.get("error") for outcome in runs.outcomes[name]] == [None, None]
    _same(runs, name)


def test_trained_mlps_and_checkpointing_under_sharding(runs: Runs) -> None:
    _same(runs, "mlps", "one-mlps")


@pytest.mark.parametrize("name", ["tuned", "tuned-shards"])
def test_the_other_stages_on_two_processes(runs: Runs, name: str) -> None:
    """Matrices, blocks, all that may train, answers, and pairs against either reference; each with averaged weights."""
    assert [outcome.get("error") for outcome in runs.outcomes[name]] == [None, None]
    _same(runs, name, "one-tuned")


def test_what_the_student_writes_is_shared(runs: Runs) -> None:
    assert [outcome.get("error") for outcome in runs.outcomes["written"]] == [None, None]
    _same(runs, "written", "one-written")


def test_half_precision_shards_of_what_trained_before(runs: Runs) -> None:
    """Weights that one stage trained in float32 and the next one freezes, beside a teacher in bfloat16."""
    assert [outcome.get("error") for outcome in runs.outcomes["half-shards"]] == [None, None]
    losses = [row["loss"] for row in runs.metrics("half-shards")]
    assert losses == pytest.approx([row["loss"] for row in runs.metrics("one-tuned")], rel=0.1)


def test_a_step_is_the_same_however_it_is_cut(runs: Runs) -> None:
    """Two processes of two micro-batches each, and one process of two micro-batches: in both stages."""
    _same(runs, "accumulated", "one-accumulated")
    _same(runs, "one-accumulated")


def test_each_process_holds_half_where_weights_are_sharded(runs: Runs) -> None:
    """Teacher's and student's together; every parameter of this teacher has an even number of rows."""
    assert {share for outcome in runs.outcomes["sharded"] for share in outcome["held"]} == {0.5}
    assert {share for outcome in runs.outcomes["replicated"] for share in outcome["held"]} == {1.0}


@pytest.mark.parametrize("name", ["two-then-one", "shards-then-one", "one-then-two", "one-then-shards"])
def test_another_number_of_processes_continues_a_run(runs: Runs, name: str) -> None:
    _same(runs, name)
    if name.startswith(("two", "shards")):
        assert [outcome["error"] for outcome in runs.outcomes[name]] == ["BrokenOff: "] * 2


def test_a_loss_that_is_nan_on_one_process_stops_both(runs: Runs) -> None:
    for outcome in runs.outcomes["diverging"]:
        assert outcome["error"].startswith("TrainingDivergedError: the loss became nan by step 5")
    stage = runs.path / "diverging" / "stages" / "02-kd"
    newest = max(stage.glob("checkpoint-*"), key=lambda path: path.name)
    assert newest.name == "checkpoint-4"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(newest / "trained.safetensors").values())


def test_a_full_disk_of_the_first_process_stops_both(runs: Runs) -> None:
    for outcome in runs.outcomes["full-disk"]:
        assert outcome["error"].startswith("OutputWriteError") and "No space left" in outcome["error"]
    kept = list((runs.path / "full-disk" / "stages" / "01-align").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-2"]


def test_the_command_speaks_once(runs: Runs) -> None:
    assert [outcome["status"] for outcome in runs.outcomes["command"]] == [0, 0]
    assert json.loads(runs.stdout)["stages"][0]["steps"] == 1
    summary = json.loads((runs.path / "command" / "stages" / "01-align" / "summary.json").read_text())
    assert (summary["processes"], summary["sharded"], summary["cuda_graphs"]) == (2, False, False)


def test_metrics_tell_speed_and_memory_of_every_process(runs: Runs) -> None:
    row = runs.metrics("sharded")[-1]
    assert row["tokens_per_second"] > 0
    assert row["peak_memory_gib_0"] > 0 and row["peak_memory_gib_1"] > 0
    assert "peak_memory_gib_1" not in runs.metrics("one")[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_gpus_are_one(write_recipe: Callable[..., Path], precision: str) -> None:
    """Whole weights (each process replays a CUDA graph of its own), shards, and shards in host memory."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    # shards in host memory first: the group must be able to sum there
    ways: dict[str, dict[str, Any]] = {
        "offloaded": {"sharded": True, "environment": {"FSDP_OFFLOAD_PARAMS": "true"}},
        "sharded": {"sharded": True},
        "replicated": {"sharded": False},
    }
    recipes = {
        way: write_recipe(f"gpu-{precision}-{way}", precision=precision, micro_batch=2) for way in (*ways, "one")
    }
    folder = recipes["one"].parent
    script = [{"recipe": str(recipes[way]), "device": "cuda", **job} for way, job in ways.items()]
    said, _ = _launch(folder / f"gpu-{precision}.json", script)
    assert [[outcome.get("error") for outcome in job] for job in said] == [[None, None]] * 3
    distill(load_recipe(recipes["one"]), device="cuda")
    runs = Runs(folder, {}, "")
    for way in ways:
        _same(runs, f"gpu-{precision}-{way}", f"gpu-{precision}-one", loose=10 if precision == "bfloat16" else 1)


# ---- without processes ---------------------------------------------------------------------------------------------


def _stream(*, share: int, micro_batch: int, count: int) -> list[list[int]]:
    """The sequences of each step, whichever process takes them."""
    steps: list[list[int]] = [[] for _ in range(7)]
    for rank in range(count):
        batches = StepBatches(10, share=share, micro_batch=micro_batch, num_steps=7, seed=3, rank=rank, count=count)
        found = list(batches)
        assert len(found) == len(batches) and {len(batch) for batch in found} == {micro_batch}
        each = share // micro_batch
        for step in range(7):
            steps[step] += [index for batch in found[step * each : (step + 1) * each] for index in batch]
    return steps


def test_steps_are_the_same_sequences_on_any_number_of_processes() -> None:
    alone = _stream(share=4, micro_batch=4, count=1)
    assert alone == _stream(share=2, micro_batch=1, count=2) == _stream(share=1, micro_batch=1, count=4)
    stream = [index for step in alone for index in step]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert stream[:10] != stream[10:20]


def _stages(teacher_directory: Path) -> list[DistillationStage]:
    teacher = mambify.load(teacher_directory).model
    student = mambify.convert(teacher, attention=0.5)
    recipe = {"teacher": "t", "data": {"train": "d"}, "output": "o"}
    kinds = [
        {"kind": "align", "tokens": 1},
        {"kind": "align", "tokens": 1, "loss": "l2"},
        {"kind": "kd", "tokens": 1, "ce_weight": 0.5, "reverse_kl_weight": 0.5, "tv_weight": 0.5, "temperature": 2.0},
    ]
    return [stage_module(s, student, teacher) for s in parse_recipe(recipe | {"stages": kinds}).stages]


def test_gradients_are_those_of_the_reported_loss(teacher_directory: Path) -> None:
    """Summed over two uneven micro-batches and finished: the gradients of the mean over both."""
    ids = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = -100
    whole = {"input_ids": ids, "labels": labels}
    for stage in _stages(teacher_directory):
        trained = list(trained_parameters(stage).values())
        for parameter in trained:
            parameter.grad = None
        totals: dict[str, torch.Tensor] = {}
        for rows in (slice(0, 2), slice(2, 5)):
            batch = {name: tensor[rows] for name, tensor in whole.items()}
            for name, pair in stage.accumulate_gradients(stage, batch, torch.Tensor.backward).sums.items():
                totals[name] = totals.get(name, torch.zeros(2)) + pair
        stage.finish_gradients(totals)
        found = [p.grad for p in trained]
        for parameter in trained:
            parameter.grad = None
        if isinstance(stage, MixerAligner):
            losses = [error / energy for error, energy in map(stage, stage.traces(ids))]
            sum(losses).backward()  # each layer's counts fully; their mean is reported
            mean = sum(losses) / len(losses)
        else:
            result = stage(**whole, num_items=totals["kl"][1])
            result.loss.backward()
            mean = result.loss
        torch.testing.assert_close(stage.loss(totals), mean.detach())
        for parameter, gradient in zip(trained, found, strict=True):
            assert parameter.grad is not None and gradient is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_lent_comes_back(device: str) -> None:
    """While a module runs its weights are elsewhere; afterwards, failed or not, they are the ones from before."""
    layer = torch.nn.Linear(4, 4)
    place = layer.weight.data_ptr()
    with lent([layer], device):
        assert layer(torch.ones(2, 4, device=device)).device.type == device
        with pytest.raises(RuntimeError):
            layer(torch.ones(2, 3, device=device))
    assert layer.weight.data_ptr() == place
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.fixture
def as_one_of_three(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torchrun leaves in the environment of one of three processes; the others never come."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_step_that_cannot_be_shared_is_refused_at_once(make_recipe: MakeRecipe, as_one_of_three: Any) -> None:
    recipe = make_recipe()
    with pytest.raises(RecipeError, match="which 3 processes cannot share evenly: the nearest that they can is 96"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_micro_batches_divide_what_a_process_takes(make_recipe: MakeRecipe, as_one_of_three: Any) -> None:
    stage = {"kind": "kd", "tokens": 10_000, "batch_tokens": 12 * 32, "micro_batch": 3}
    with pytest.raises(RecipeError, match=r"does not divide the 4 sequences of each process in a step: .* is 2"):
        distill(make_recipe(stages=[stage]), device="cpu")


_DEEPSPEED = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "stage", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "gradient_checkpointing of the stage"),
        ({}, {"trainer": {"torch_compile": True}}, "torch_compile does not go with sharded weights"),
        ({}, {"trainer": {"optim": "adamw_bnb_8bit"}}, "adamw_bnb_8bit does not go with sharded weights"),
        (_DEEPSPEED, {}, "DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "trainer.torch_compile of stage kd"),
        ({}, {"kind": "on_policy"}, "takes whole weights"),
        ({}, {"optimizer": "muon"}, "muon needs whole matrices"),
        (_DEEPSPEED, {"kind": "dpo", "batch_tokens": 192}, "counts pairs"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(
    make_recipe: MakeRecipe,
    as_one_of_three: pytest.MonkeyPatch,
    environment: dict[str, str],
    stage: dict[str, Any],
    message: str,
) -> None:
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        as_one_of_three.setenv(name, value)
    recipe = make_recipe(stages=[{"kind": "align", "tokens": 1000, "batch_tokens": 96, **stage}])
    with pytest.raises(UnsupportedError, match=message):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_checkpointing": True}, "key of the stage itself"),
        ({"fsdp": "full_shard"}, "accelerate launch"),
        ({"max_steps": 2}, "'trainer.max_steps' has no place there: it is the stage's tokens"),
        ({"gradient_accumulation_steps": 3}, "batch_tokens over its micro_batch"),
        ({"output_dir": "/elsewhere"}, "the recipe's output"),
        ({"eval_strategy": "steps"}, "has no effect: a stage only trains"),
        ({"xyzzy": 1}, "none of the .* known ones is like it"),
        ({"optim": "galore_adamw"}, "galore_adamw is not supported"),
        ({"torch_compile": True}, "stage align: torch_compile"),
    ],
)
def test_what_the_trainer_would_ignore_or_break_is_refused(
    make_recipe: MakeRecipe, trainer: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(stages=[{"kind": "align", "tokens": 1000, "batch_tokens": 128, "trainer": trainer}])
    with pytest.raises(RecipeError, match=message):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_one_gpu_for_all_is_refused(as_one_of_three: Any) -> None:
    with pytest.raises(InvalidOptionError, match="leave the device out"), joined("cuda:0"):
        pass


def test_another_optimizer_is_taken(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stage = {"kind": "align", "tokens": 256, "batch_tokens": 128, "calibration_tokens": 0}
    runs = []
    for optim in ("sgd", "adamw_torch"):
        recipe = make_recipe(stages=[{**stage, "trainer": {"optim": optim}}], output=str(tmp_path / optim))
        runs.append(distill(recipe, device="cpu")[0].state_dict())
    name = "model.layers.0.mixer.in_proj.weight"
    assert not torch.equal(runs[0][name], runs[1][name])


def test_gradient_checkpointing_computes_the_student_twice(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Mamba2Mixer.forward, [0]

    def counted(self: Mamba2Mixer, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Mamba2Mixer, "forward", counted)
    for checkpointing, times in ((False, 1), (True, 2)):
        stage = {"kind": "kd", "tokens": 128, "batch_tokens": 128, "gradient_checkpointing": checkpointing}
        calls[0] = 0
        distill(make_recipe(stages=[stage], output=str(tmp_path / str(checkpointing))), device="cpu")
        assert calls[0] == 2 * times  # layers


def test_when_steps_are_recorded(make_recipe: MakeRecipe) -> None:
    """With whole weights on a GPU, whatever the number of processes; else the reason is named."""
    recipe = make_recipe()
    gpu, shards = Processes(1, 2, "cuda:1"), Processes(1, 2, "cuda:1", Sharding())
    assert why_no_graphs(recipe, recipe.stages[0], Processes(device="cuda")) is None
    assert why_no_graphs(recipe, recipe.stages[0], gpu) is None
    assert why_no_graphs(recipe, recipe.stages[0], shards) == "weights are sharded"
    assert why_no_graphs(recipe, recipe.stages[0], Processes()) == "they need a GPU"
    checkpointed = make_recipe(stages=[{"kind": "kd", "tokens": 1000, "gradient_checkpointing": True}])
    assert why_no_graphs(checkpointed, checkpointed.stages[0], gpu) == "gradient checkpointing is on"
    assert why_no_graphs(make_recipe(cuda_graphs=False), recipe.stages[0], gpu) == "the recipe says so"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_launch_configuration_is_read_by_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
