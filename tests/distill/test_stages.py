"""Every kind of stage on a tiny teacher: that it learns what it is for, and changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import mambify
from mambify.distill.logs import read_metrics
from mambify.distill.recipe import Recipe
from mambify.distill.run import summaries
from mambify.errors import (
    DataOverlapError,
    InvalidOptionError,
    RecipeError,
    TokenizerMismatchError,
    UnsupportedError,
    UsageError,
)
from mambify.workflows.distill import distill

MakeRecipe = Callable[..., Recipe]
STEP = 4 * 64


def _stage(kind: str, steps: int, **changes: Any) -> dict[str, Any]:
    return {"kind": kind, "tokens": steps * STEP, "batch_tokens": STEP, **changes}


def _values(run: Path, stage: str, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if row["stage"] == stage and row["step"] > 0]


def _falls(values: list[float], to: float = 0.9) -> bool:
    return sum(values[-5:]) < to * sum(values[:5])


# ---- what each learns ----------------------------------------------------------------------------------------------


def test_sft_learns_the_answers(make_chat_recipe: MakeRecipe) -> None:
    _, run = distill(make_chat_recipe(stages=[_stage("sft", 20, learning_rate=3e-3)]), device="cpu")
    assert _falls(_values(run, "01-sft", "ce"))
    assert _values(run, "01-sft", "ce") == pytest.approx(_values(run, "01-sft", "loss"), rel=1e-3)


def test_sft_beside_the_teacher_tells_both(make_chat_recipe: MakeRecipe) -> None:
    _, run = distill(make_chat_recipe(stages=[_stage("sft", 2, kl_weight=0.5)]), device="cpu")
    row = read_metrics(run / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(row["ce"] + 0.5 * row["kl"], rel=1e-4)


def test_dpo_prefers_what_was_preferred(make_chat_recipe: MakeRecipe, pairs_file: Path) -> None:
    told: list[str] = []
    dpo = _stage("dpo", 30, learning_rate=3e-3, data={"train": str(pairs_file)}, reference="student")
    _, run = distill(make_chat_recipe(stages=[dpo]), device="cpu", announce=told.append)
    assert _values(run, "01-dpo", "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # student and reference are one
    assert _values(run, "01-dpo", "rewards/margins")[0] == pytest.approx(0.0, abs=1e-4)
    assert _values(run, "01-dpo", "rewards/accuracies")[-1] == 1.0
    assert _values(run, "01-dpo", "loss")[-1] < 0.1
    assert any("24 pairs, 2 dropped (1 identical, 1 empty)" in line for line in told)
    assert summaries(run)[0]["tokens"] == 30 * STEP


def test_all_terms_of_dpo_are_in_its_loss(make_chat_recipe: MakeRecipe, pairs_file: Path) -> None:
    terms = {"sft_weight": 0.3, "kl_weight": 0.2, "label_smoothing": 0.1}
    _, run = distill(
        make_chat_recipe(stages=[_stage("dpo", 2, data={"train": str(pairs_file)}, **terms)]), device="cpu"
    )
    for row in read_metrics(run / "metrics.jsonl"):
        assert row["loss"] == pytest.approx(row["dpo"] + 0.3 * row["nll"] + 0.2 * row["kl"], rel=1e-4)
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"share": 0.5, "kl_weight": 0.5}, {"prompts": "data"}])
def test_on_policy_learns_from_what_the_student_writes(make_chat_recipe: MakeRecipe, settings: dict[str, Any]) -> None:
    stage = _stage("on_policy", 6, tokens_per_round=3 * STEP, max_new_tokens=24, learning_rate=3e-3, **settings)
    _, run = distill(make_chat_recipe(stages=[stage]), device="cpu")
    assert len(_values(run, "01-on_policy", "reverse_kl")) == 6
    assert not (run / "stages" / "01-on_policy" / "rounds").exists()


@pytest.mark.parametrize(("kind", "rate"), [("hidden", 3e-3), ("mixing", 1e-2)])
def test_layers_learn_one_by_one(make_recipe: MakeRecipe, kind: str, rate: float) -> None:
    student, run = distill(make_recipe(stages=[_stage(kind, 20, learning_rate=rate)]), device="cpu")
    for layer in student.config.converted_layers:
        assert _falls(_values(run, f"01-{kind}", f"layer_{layer:02d}")), layer


def test_align_by_the_length_of_the_error(make_recipe: MakeRecipe) -> None:
    _, run = distill(make_recipe(stages=[_stage("align", 20, loss="l2", calibration_tokens=0)]), device="cpu")
    assert _falls(_values(run, "01-align", "loss"))


def test_reverse_kl_takes_part(make_recipe: MakeRecipe) -> None:
    weights = {"kl_weight": 0.5, "reverse_kl_weight": 0.25, "ce_weight": 1.0}
    _, run = distill(make_recipe(stages=[_stage("kd", 2, **weights)]), device="cpu")
    row = read_metrics(run / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(0.5 * row["kl"] + 0.25 * row["reverse_kl"] + row["ce"], rel=1e-4)


def test_total_variation_alone_is_a_loss(make_recipe: MakeRecipe) -> None:
    weights = {"kl_weight": 0.0, "tv_weight": 1.0, "learning_rate": 1e-2}
    _, run = distill(make_recipe(stages=[_stage("kd", 30, **weights)]), device="cpu")
    variation = _values(run, "01-kd", "tv")
    assert variation == pytest.approx(_values(run, "01-kd", "loss"), rel=1e-5)
    assert _falls(variation)
    assert 0 < variation[-1] < variation[0] < 1
    assert len(_values(run, "01-kd", "kl")) == 30  # told all the same


@pytest.mark.parametrize(("features", "passes"), [(False, [""]), (True, ["", "_2", "_3"])])
def test_a_draft_learns_to_be_accepted(make_recipe: MakeRecipe, features: bool, passes: list[str]) -> None:
    rates = {"mlp_learning_rate": 1e-3, "rest_learning_rate": 1e-3}
    stages = [_stage("kd", 2, **rates), _stage("kd", 2, kl_weight=0.1, tv_weight=0.5, **rates)]
    recipe = make_recipe(stages=stages, student={"layers": 1, "features": features, "attention": 1.0})
    _, run = distill(recipe, device="cpu")
    rows = read_metrics(run / "metrics.jsonl")
    first, last = ([row for row in rows if row["stage"] == stage] for stage in ("01-kd", "02-kd"))
    assert first and not any("tv" in row for row in first)
    for row in last:
        parts = [0.1 * row[f"kl{number}"] + 0.5 * row[f"tv{number}"] for number in passes]
        assert row["loss"] == pytest.approx(sum(0.8**k * part for k, part in enumerate(parts)), rel=1e-4)


# ---- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_rest_trains_when_asked_and_the_teacher_stays(
    make_recipe: MakeRecipe, teacher_directory: Path, precision: str
) -> None:
    teacher = mambify.load(teacher_directory)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    kd = _stage("kd", 3, rest_learning_rate=1e-3, mlp_learning_rate=1e-3)
    recipe = make_recipe(stages=[kd], precision=precision)
    student, run = distill(recipe, device="cpu", teacher=teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    saved = load_file(run / "student" / "model.safetensors")
    for name, tensor in before.items():
        if name not in saved:
            continue
        shared = name.startswith(("model.embed_tokens", "lm_head"))
        assert torch.equal(tensor, saved[name]) == shared, name
    assert student.model.layers[1].mixer.q_proj.weight is not teacher.model.model.layers[1].mixer.q_proj.weight


def test_what_one_stage_trained_the_next_one_keeps(make_recipe: MakeRecipe) -> None:
    """MLPs and norms that only the first stage trains are in the student, and unchanged by the second."""
    first = _stage("kd", 2, rest_learning_rate=1e-3, mlp_learning_rate=1e-3)
    _, run = distill(make_recipe(stages=[first, _stage("kd", 2)]), device="cpu")
    trained = load_file(run / "stages" / "01-kd" / "trained.safetensors")
    saved = load_file(run / "student" / "model.safetensors")
    assert torch.equal(trained["pairs.2.student.mlp.up_proj.weight"], saved["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(trained["norm.weight"], saved["model.norm.weight"])
    second = load_file(run / "stages" / "02-kd" / "trained.safetensors")
    assert torch.equal(second["pairs.2.student.mixer.A_log"], saved["model.layers.2.mixer.A_log"])


def test_learning_rates_reach_what_they_are_for(make_recipe: MakeRecipe, teacher_directory: Path) -> None:
    from mambify.distill.stages import parameter_groups, stage_module

    teacher = mambify.load(teacher_directory).model
    kd = _stage("kd", 1, learning_rate=1e-3, mlp_learning_rate=1e-4, rest_learning_rate=1e-5, weight_decay=0.1)
    stage = make_recipe(stages=[kd]).stages[0]
    module = stage_module(stage, mambify.convert(teacher, attention=0.5), teacher)
    rates = {id(p): group["lr"] for group in parameter_groups(stage, module) for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in module.parameters())
    layers = module.pairs
    assert rates[id(layers[0].student.mixer.in_proj.weight)] == 1e-3
    assert rates[id(layers[0].student.mixer.norm.weight)] == 1e-3
    assert rates[id(layers[0].student.mlp.up_proj.weight)] == 1e-4
    assert rates[id(layers[1].student.mixer.q_proj.weight)] == 1e-5
    assert rates[id(layers[0].student.input_layernorm.weight)] == rates[id(module.norm.weight)] == 1e-5
    assert id(module.embed_tokens.weight) not in rates and id(module.lm_head.weight) not in rates


def test_the_average_of_weights_is_what_is_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Decay 0.6 over three steps, by hand from the weights of runs that end after one, two and three of them."""
    kd = {"kind": "kd", "learning_rate": 1e-2, "schedule": "constant", "warmup": 0, "batch_tokens": STEP}
    ends = []
    for steps in (0, 1, 2, 3):
        stage = kd | {"tokens": max(steps, 1) * STEP} | ({} if steps else {"learning_rate": 1e-30})
        recipe = make_recipe(stages=[stage], output=str(tmp_path / f"run-{steps}"))
        ends.append(distill(recipe, device="cpu")[0].state_dict())
    recipe = make_recipe(stages=[kd | {"tokens": 3 * STEP, "ema": 0.6}], output=str(tmp_path / "averaged"))
    averaged = distill(recipe, device="cpu")[0].state_dict()
    name = "model.layers.0.mixer.in_proj.weight"
    expected = ends[0][name]
    for step, weights in enumerate(ends[1:], start=1):
        keep = min(0.6, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weights[name]
    assert not torch.allclose(averaged[name], ends[3][name], atol=1e-4)
    torch.testing.assert_close(averaged[name], expected, rtol=0, atol=1e-6)


# ---- which text, which models --------------------------------------------------------------------------------------


def test_a_long_stage_has_longer_sequences(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambify.distill.kd import KnowledgeDistiller

    forward, shapes = KnowledgeDistiller.forward, []

    def watched(self: KnowledgeDistiller, **batch: torch.Tensor) -> Any:
        shapes.append(tuple(batch["input_ids"].shape))
        return forward(self, **batch)

    monkeypatch.setattr(KnowledgeDistiller, "forward", watched)
    stages = [_stage("kd", 2), _stage("kd", 2, data={"context_length": 128})]
    _, run = distill(make_recipe(stages=stages), device="cpu")
    assert shapes == [(8, 32)] * 2 + [(2, 128)] * 2
    assert [row["tokens"] for row in summaries(run)] == [2 * STEP, 2 * STEP]


def test_the_text_of_every_stage_is_held_against_heldout_text(make_recipe: MakeRecipe, text_file: Path) -> None:
    other = text_file.parent / "other.jsonl"
    rows = text_file.read_text(encoding="utf-8").splitlines()[:40]
    other.write_text("\n".join(rows) + "\n", encoding="utf-8")
    stages = [_stage("align", 1), _stage("kd", 1, data={"heldout": str(other)})]
    recipe = make_recipe(stages=stages)
    with pytest.raises(DataOverlapError):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_a_stage_without_readable_text_is_refused_before_anything_is_written(make_chat_recipe: MakeRecipe) -> None:
    recipe = make_chat_recipe(stages=[_stage("kd", 1), _stage("dpo", 1)])
    with pytest.raises(UsageError, match=r"line 1: expected \{prompt, chosen, rejected\}"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_a_larger_teacher_of_the_same_vocabulary(
    make_chat_recipe: MakeRecipe, chat_teacher: Path, tmp_path: Path
) -> None:
    from tiny import byte_tokenizer, llama

    tokenizer = byte_tokenizer()
    llama(len(tokenizer), seed=1, num_hidden_layers=6, hidden_size=48, num_attention_heads=3).save_pretrained(
        tmp_path / "big"
    )
    tokenizer.save_pretrained(tmp_path / "big")
    stages = [_stage("align", 2), _stage("kd", 20, learning_rate=3e-3)]
    recipe = make_chat_recipe(
        teacher=str(tmp_path / "big"), student={"base": str(chat_teacher), "attention": 0.5}, stages=stages
    )
    student, run = distill(recipe, device="cpu")
    assert _falls(_values(run, "02-kd", "kl"), 0.97)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (4, 32)
    base, saved = load_file(chat_teacher / "model.safetensors"), load_file(run / "student" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(base[name], saved[name])


def test_a_teacher_of_another_vocabulary_is_refused(make_chat_recipe: MakeRecipe, teacher_directory: Path) -> None:
    recipe = make_chat_recipe(teacher=str(teacher_directory), student={"base": make_chat_recipe().teacher})
    with pytest.raises(TokenizerMismatchError, match=r"vocabulary of 64 tokens and student\.base one of 299"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_a_student_goes_on_from_a_directory(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A distilled student as base: nothing more is converted, its mixers train on, and its file stays as it is."""
    first = make_recipe(stages=[_stage("kd", 2)], output=str(tmp_path / "first"))
    distill(first, device="cpu")
    directory = tmp_path / "first" / "student"
    before = load_file(directory / "model.safetensors")
    second = make_recipe(stages=[_stage("kd", 2)], student={"base": str(directory)}, output=str(tmp_path / "second"))
    student, _ = distill(second, device="cpu")
    assert student.config.converted_layers == [0, 2]
    name = "model.layers.0.mixer.in_proj.weight"
    assert not torch.equal(student.state_dict()[name], before[name])
    assert torch.equal(load_file(directory / "model.safetensors")[name], before[name])
    third = make_recipe(stages=[_stage("align", 1)], student={"base": str(directory)}, output=str(tmp_path / "third"))
    with pytest.raises(InvalidOptionError, match="stage align has nothing to train"):
        distill(third, device="cpu")


def test_mixing_needs_a_mixer_that_is_a_matrix(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"mixer": "mamba1"}, stages=[_stage("mixing", 1)])
    with pytest.raises(UnsupportedError, match="choose mixer mamba2"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_layer_by_layer(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(student={"attention": 0.0, "stepwise": True}, stages=[_stage("align", 8), _stage("kd", 8)])
    student, run = distill(recipe, device="cpu")
    assert student.config.converted_layers == [0, 1, 2, 3]
    assert [row["attention"] for row in summaries(run)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0]
    assert [row["steps"] for row in summaries(run)] == [2] * 8


# ---- how a step is cut, and continued ------------------------------------------------------------------------------

KINDS = ["sft", "dpo", "on_policy", "hidden", "mixing"]


def _of_kind(kind: str, pairs_file: Path, steps: int, **changes: Any) -> dict[str, Any]:
    own = {
        "dpo": {"data": {"train": str(pairs_file)}, "kl_weight": 0.5, "sft_weight": 0.5, "batch_tokens": 2 * STEP},
        "on_policy": {"tokens_per_round": 2 * STEP, "max_new_tokens": 16},
    }
    return _stage(kind, steps, learning_rate=1e-3, **own.get(kind, {}) | changes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "on_policy"])
def test_accumulating_micro_batches_is_one_large_batch(
    make_chat_recipe: MakeRecipe, pairs_file: Path, tmp_path: Path, kind: str
) -> None:
    runs = []
    for micro_batch in (4, 1):
        stage = _of_kind(kind, pairs_file, 4, micro_batch=micro_batch, clip=0, trainer={"optim": "sgd"})
        recipe = make_chat_recipe(stages=[stage], output=str(tmp_path / f"run-{micro_batch}"))
        runs.append(distill(recipe, device="cpu")[0].state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in KINDS), *((kind, {"ema": 0.9, "optimizer": "muon"}) for kind in ("hidden", "on_policy"))],
)
def test_broken_off_and_started_again_it_ends_the_same(
    make_chat_recipe: MakeRecipe,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
) -> None:
    """Stopped after a checkpoint and some more steps, in the middle of a round: the weights of a run in one go."""
    from mambify.distill.trainer import StageTrainer

    stage = _of_kind(kind, pairs_file, 8, **settings)
    stage["tokens"] = 8 * stage["batch_tokens"]
    ends = []
    for name in ("whole", "broken"):
        recipe = make_chat_recipe(stages=[stage], output=str(tmp_path / name))
        if name == "broken":
            step = StageTrainer.training_step

            def stopping(self: StageTrainer, *args: Any, step: Any = step, **kwargs: Any) -> torch.Tensor:
                if self.state.global_step == 5:
                    raise KeyboardInterrupt
                result: torch.Tensor = step(self, *args, **kwargs)
                return result

            with monkeypatch.context() as patch:
                patch.setattr(StageTrainer, "training_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    distill(recipe, device="cpu")
        ends.append(distill(recipe, device="cpu")[0].state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_killed_after_the_last_checkpoint_the_average_is_still_what_is_kept(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambify.distill import run as run_module

    ends = []
    for name in ("whole", "broken"):
        recipe = make_recipe(stages=[_stage("kd", 4, ema=0.5, learning_rate=1e-2)], output=str(tmp_path / name))
        if name == "broken":
            with monkeypatch.context() as patch:
                patch.setattr(run_module, "save_trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
                with pytest.raises(KeyboardInterrupt):
                    distill(recipe, device="cpu")
        ends.append(distill(recipe, device="cpu")[0].state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_student_that_cannot_write_is_refused_before_anything_is_written(
    make_recipe: MakeRecipe, make_chat_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(stages=[_stage("on_policy", 1, prompts="chat")])
    with pytest.raises(UnsupportedError, match="no chat template"):
        distill(recipe, device="cpu")
    recipe = make_chat_recipe(stages=[_stage("on_policy", 1, max_new_tokens=300)])
    with pytest.raises(InvalidOptionError, match="256 positions"):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


class _NoWaiting(TorchDispatchMode):
    """Fails at an operation whose result the host must see: with it a step could not be recorded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"), name
        masks = [x for x in (args[1] if name in ("index", "index_put_") else ()) if x is not None]
        assert all(mask.dtype not in (torch.bool, torch.uint8) for mask in masks), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_what_waits_is_seen() -> None:
    x = torch.ones(3, requires_grad=True)
    for wait in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.nonzero()):
        with _NoWaiting(), pytest.raises(AssertionError):
            wait()


@pytest.mark.parametrize("kind", [*KINDS, "kd", "align"])
def test_a_step_never_waits_for_the_device(
    make_chat_recipe: MakeRecipe, chat_teacher: Path, pairs_file: Path, kind: str
) -> None:
    """Every operation of a step and of its backward pass keeps its result on the device."""
    from mambify.distill.stages import collate, stage_module
    from mambify.workflows.texts import Texts

    teacher = mambify.load(chat_teacher)
    recipe = make_chat_recipe(stages=[_of_kind(kind, pairs_file, 1), _stage("kd", 1)])
    module = stage_module(recipe.stages[0], mambify.convert(teacher.model, attention=0.5), teacher.model)
    stage = recipe.stages[1 if kind == "on_policy" else 0]
    text: Any = Texts(recipe, teacher, lambda _: None)(stage)
    batch = collate([text[0], text[1]])
    with _NoWaiting():
        sums = module.accumulate_gradients(module, batch, torch.Tensor.backward).sums
        module.finish_gradients(sums)
        module.loss(sums)
    assert any(p.grad is not None for p in module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, "kd", "kd with features"])
def test_recorded_steps_are_the_steps(
    make_chat_recipe: MakeRecipe, pairs_file: Path, tmp_path: Path, kind: str
) -> None:
    """On a GPU every stage is recorded as a CUDA graph, and gives the losses that it gives step by step."""
    losses, changes = [], {}
    if kind.endswith("features"):
        kind, changes = "kd", {"student": {"layers": 2, "features": True}}
    for graphs in (True, False):
        stage = _of_kind(kind, pairs_file, 6, ema=0.5)
        stage["tokens"] = 6 * stage["batch_tokens"]
        stage |= {"rest_learning_rate": 1e-3} if changes else {}
        recipe = make_chat_recipe(**changes, stages=[stage], output=str(tmp_path / str(graphs)), cuda_graphs=graphs)
        _, run = distill(recipe, device="cuda")
        assert summaries(run)[0]["cuda_graphs"] is graphs
        losses.append(_values(run, f"01-{kind}", "loss"))
    steps = 2 if kind == "on_policy" else 6  # later rounds are drawn from weights that differ in rounding
    assert losses[0][:steps] == pytest.approx(losses[1][:steps], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (_stage("kd", 1, trainer={"optim": "nonsense"}), "nonsense"),
        (_stage("on_policy", 1, trainer={"dataloader_num_workers": 1}), "set dataloader_num_workers to 0"),
        (_stage("hidden", 1, trainer={"torch_compile": True}), "stage hidden: torch_compile"),
        (_stage("dpo", 1, batch_tokens=6 * 64, micro_batch=2), "micro_batch 2 does not divide the 3"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    make_chat_recipe: MakeRecipe, stage: dict[str, Any], message: str
) -> None:
    recipe = make_chat_recipe(stages=[stage])
    with pytest.raises(RecipeError, match=message):
        distill(recipe, device="cpu")
    assert not Path(recipe.output).exists()


def test_the_run_says_which_tokens_answers_are(make_chat_recipe: MakeRecipe, chat_file: Path) -> None:
    """Of a conversation of two exchanges both answers are learned, and the second question is not."""
    from mambify.data.documents import read_documents

    tokenizer = mambify.load(make_chat_recipe().teacher).tokenizer
    assert tokenizer is not None
    document = read_documents(str(chat_file), tokenizer, split="all")[0]
    said = [tokenizer.decode(document.input_ids[start:end]) for start, end in document.answer_spans]
    row = json.loads(chat_file.read_text(encoding="utf-8").splitlines()[0])["messages"]
    assert said == [row[1]["content"] + "<|im_end|>", row[3]["content"] + "<|im_end|>"]
