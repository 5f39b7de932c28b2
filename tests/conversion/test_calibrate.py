"""Output projections by least squares: the error falls, and the solution is the direct one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.conversion import calibrate
from mambify.mixers import MixerContext

Teacher = Callable[..., PreTrainedModel]


@pytest.fixture(params=["llama3", "llama-biased"])
def teacher(request: pytest.FixtureRequest, tiny_teacher: Teacher, tmp_path: Path) -> HybridForCausalLM:
    tiny_teacher(request.param).save_pretrained(tmp_path)
    return mambify.load(tmp_path).model


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (4, 48), generator=generator) for _ in range(count)]


@torch.no_grad()
def features_and_targets(
    student: HybridForCausalLM, teacher: HybridForCausalLM, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``out_proj`` of a layer reads on the teacher's own hidden states, gives, and should give; in float64."""
    mixer = student.model.layers[layer].mixer
    features, given, wanted = [], [], []
    hook = mixer.out_proj.register_forward_pre_hook(lambda _, args: features.append(args[0].flatten(0, 1)))
    for ids in batches():
        for trace in teacher.model.mixer_traces(ids, [layer]):
            given.append(mixer(trace.input_BTD, MixerContext(), None)[0].flatten(0, 1))
            wanted.append(trace.output_BTD.flatten(0, 1))
    hook.remove()
    return torch.cat(features).double(), torch.cat(given).double(), torch.cat(wanted).double()


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_is_the_direct_solution(teacher: HybridForCausalLM, mixer: str) -> None:
    student, untouched = (mambify.convert(teacher, mixer=mixer) for _ in range(2))
    report = calibrate(student, teacher, batches(), ridge=1e-4)
    assert set(report) == {0, 2}
    for layer, (before, after) in report.items():
        f_MI, given, wanted = features_and_targets(untouched, teacher, layer)
        bias = untouched.model.layers[layer].mixer.out_proj.bias
        target = wanted if bias is None else wanted - bias.double()
        penalty = 1e-4 * f_MI.square().sum(0).mean()
        rows = torch.cat([f_MI, penalty.sqrt() * torch.eye(f_MI.shape[1])])
        direct = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(f_MI.shape[1], 64)])).solution
        weight = student.model.layers[layer].mixer.out_proj.weight
        assert (weight.T - direct).abs().max() <= 1e-3 * direct.abs().max()
        assert before == pytest.approx(((given - wanted).square().sum() / target.square().sum()).item(), rel=1e-3)
        measured = ((f_MI @ direct - target).square().sum() / target.square().sum()).item()
        assert after == pytest.approx(measured, rel=1e-2, abs=1e-4)
        assert after < min(before, 1.0)


def test_lowers_the_distance_to_the_teacher(teacher: HybridForCausalLM) -> None:
    student, ids = mambify.convert(teacher), torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def divergence() -> float:
        expected, actual = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
        return torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="batchmean").item()

    before = divergence()
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    calibrate(student, teacher, batches())
    assert divergence() < 0.8 * before
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())


def test_bfloat16_teacher(tiny_teacher: Teacher, tmp_path: Path) -> None:
    tiny_teacher("llama3").bfloat16().save_pretrained(tmp_path)
    teacher = mambify.load(tmp_path).model
    student = mambify.convert(teacher)
    for before, after in calibrate(student, teacher, batches()).values():
        assert after < before
    assert student.model.layers[0].mixer.out_proj.weight.dtype == torch.bfloat16
