"""Exchanging one layer at a time gives what whole forward passes give; restoring everything is the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.evaluate.perplexity import evaluate_language_model
from mambify.families.load import LoadedModel
from mambify.mixers import Mixer
from mambify.selection import METHODS, Candidates, swapped_divergences

Teacher = Callable[..., PreTrainedModel]


@pytest.fixture(params=["llama3", "mistral"])
def teacher(request: pytest.FixtureRequest, tiny_teacher: Teacher, tmp_path: Path) -> HybridForCausalLM:
    tiny_teacher(request.param).save_pretrained(tmp_path)
    return mambify.load(tmp_path).model


def blocks(rows: int = 5) -> Tensor:
    return torch.randint(3, 96, (rows, 20), generator=torch.Generator().manual_seed(0))


def new_mixers(teacher: HybridForCausalLM) -> dict[int, Mixer]:
    student = mambify.convert(teacher, attention=0.0)
    return {index: layer.mixer for index, layer in enumerate(student.model.layers)}


def candidates(teacher: HybridForCausalLM, spread: tuple[int, ...] = (1, 3)) -> Candidates:
    errors = {0: 0.4, 1: 0.9, 2: 0.1, 3: 0.3}
    return Candidates(teacher, new_mixers(teacher), errors, blocks(), spread, batch_size=2)


def divergence(teacher: HybridForCausalLM, kept: list[int]) -> float:
    """The long way: a converted model, evaluated as any other."""
    student = mambify.convert(teacher, attention_layers=kept)
    return evaluate_language_model(student, blocks(), teacher=teacher, resamples=1).kl.value


def test_restoring_everything_is_the_teacher(teacher: HybridForCausalLM) -> None:
    attention = {index: layer.mixer for index, layer in enumerate(teacher.model.layers)}
    found = swapped_divergences(teacher, {}, attention, blocks())
    assert abs(found.base) < 1e-6
    assert all(abs(value) < 1e-6 for value in found.by_layer.values())
    assert found.num_tokens == 5 * 19


def test_leave_one_out_is_what_evaluation_says(teacher: HybridForCausalLM) -> None:
    steps: list[tuple[int, int]] = []
    scores = METHODS["leave-one-out"](candidates(teacher), lambda done, total: steps.append((done, total)))
    for index in range(4):
        others = [i for i in range(4) if i != index]
        assert scores.worth[index] == pytest.approx(divergence(teacher, others), rel=1e-3, abs=1e-5)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_restore_one_is_what_evaluation_says(teacher: HybridForCausalLM) -> None:
    scores = METHODS["restore-one"](candidates(teacher), None)
    without = divergence(teacher, [])
    assert scores.measured["kl_without_attention"] == pytest.approx(without, rel=1e-3)
    for index in range(4):
        assert scores.worth[index] == pytest.approx(without - divergence(teacher, [index]), rel=1e-2, abs=1e-4)


def test_greedy_goes_on_from_its_own_choice(teacher: HybridForCausalLM) -> None:
    worth = METHODS["greedy"](candidates(teacher), None).worth
    first = min(range(4), key=lambda index: divergence(teacher, [index]))
    second = min((i for i in range(4) if i != first), key=lambda index: divergence(teacher, [first, index]))
    assert worth == {index: {first: 2.0, second: 1.0}.get(index, 0.0) for index in range(4)}


def test_trial_and_uniform(teacher: HybridForCausalLM) -> None:
    assert METHODS["trial"](candidates(teacher), None).worth == {0: 0.4, 1: 0.9, 2: 0.1, 3: 0.3}
    assert METHODS["uniform"](candidates(teacher), None).worth == {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}
    assert METHODS["uniform"](candidates(teacher, (3,)), None).worth == {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0}


def test_models_are_left_as_they_were(teacher: HybridForCausalLM) -> None:
    chosen = candidates(teacher)
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    for method in METHODS.values():
        method(chosen, None)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert sorted(chosen.mixers) == [0, 1, 2, 3]


@pytest.mark.slow
def test_on_the_real_teacher(smollm2: LoadedModel) -> None:
    """Every layer's loss costs something; the first layer, which most of the stream starts from, is among the worst."""
    ids = torch.tensor(
        smollm2.tokenizer("The history of the steam engine begins long before the railways. " * 6)["input_ids"]
    )
    student = mambify.convert(smollm2, attention=0.0)
    mixers = {index: layer.mixer for index, layer in enumerate(student.model.layers)}
    found = swapped_divergences(smollm2.model, {}, mixers, ids[None, :64])
    assert abs(found.base) < 1e-4
    assert len(found.by_layer) == 30
    assert all(value > 1e-3 for value in found.by_layer.values())
    assert found.by_layer[0] > sorted(found.by_layer.values())[15]
