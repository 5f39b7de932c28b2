"""Initialisations by name: each measured step does what it says, on tiny models and on the real teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.conversion import INITIALISATIONS, apply_plan, needs_text, plan
from mambify.conversion.sample import AttentionSample, sample_attention
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel
from mambify.mixers import MixerContext
from mambify.mixers.mamba2 import Mamba2Mixer

Teacher = Callable[..., PreTrainedModel]
MEASURED = [name for name in INITIALISATIONS if needs_text(name)]


def load(tiny_teacher: Teacher, path: Path, kind: str = "llama3") -> HybridForCausalLM:
    tiny_teacher(kind).save_pretrained(path)
    return mambify.load(path).model


@pytest.fixture
def teacher(tiny_teacher: Teacher, tmp_path: Path) -> HybridForCausalLM:
    return load(tiny_teacher, tmp_path)


def blocks(rows: int = 12, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def sampled(teacher: HybridForCausalLM, layer: int = 0, ids: Tensor | None = None) -> AttentionSample:
    ids = blocks() if ids is None else ids
    (trace,) = teacher.model.mixer_traces(ids, [layer])
    contexts, _ = teacher.model.layer_contexts(trace.input_BTD)
    return sample_attention(teacher.model.layers[layer].mixer, [trace], contexts[layer])


def mixer_of(student: HybridForCausalLM, layer: int = 0) -> Mamba2Mixer:
    return student.model.layers[layer].mixer


@torch.no_grad()
def error(student: HybridForCausalLM, teacher: HybridForCausalLM, ids: Tensor) -> float:
    """Mean over converted layers of the squared error over the squared output, as align counts it."""
    errors = []
    for trace in teacher.model.mixer_traces(ids, student.config.converted_layers):
        given, _ = mixer_of(student, trace.layer_idx)(trace.input_BTD, MixerContext(), None)
        errors.append(((given - trace.output_BTD).square().sum() / trace.output_BTD.square().sum()).item())
    return sum(errors) / len(errors)


@torch.no_grad()
def divergence(student: HybridForCausalLM, teacher: HybridForCausalLM, ids: Tensor) -> float:
    expected, actual = (model(ids).logits.log_softmax(-1).flatten(0, 1) for model in (teacher, student))
    return F.kl_div(actual, expected, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("kind", ["llama3", "llama-biased", "mistral", "qwen3", "qwen2-yarn"])
def test_a_sample_is_what_the_attention_does(tiny_teacher: Teacher, tmp_path: Path, kind: str) -> None:
    teacher = load(tiny_teacher, tmp_path, kind)
    sample = sampled(teacher)
    attention = teacher.model.layers[0].mixer
    with torch.no_grad():
        given = attention.o_proj(sample.heads_BTHP.flatten(2))
    assert torch.allclose(given, sample.output_BTD, atol=1e-5)
    assert torch.allclose(sample.lags_HL.sum(-1), torch.ones(4))
    window = attention.attend.sliding_window
    if window is not None:
        assert sample.lags_HL[:, window:].abs().max() == 0
        assert sample.lags_HL[:, window - 1].min() > 0
    assert torch.allclose(sample.cos_LJ.square() + sample.sin_LJ.square(), torch.ones_like(sample.cos_LJ), atol=1e-5)


def test_attention_on_one_lag_is_seen_at_it(teacher: HybridForCausalLM) -> None:
    """Scores that only position decides: of equal keys and queries, uniform attention, whose lags can be counted."""
    attention = teacher.model.layers[0].mixer
    attention.q_proj.weight.data.zero_()
    length = 9
    sample = sampled(teacher, ids=blocks(2, length))
    expected = torch.zeros(length)
    for t in range(1, length):
        expected[:t] += 1 / (t + 1)  # every earlier token but the first, and itself
    assert torch.allclose(sample.lags_HL[0], expected / expected.sum(), atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_decay_matches_the_measured_distance(teacher: HybridForCausalLM, mixer: str) -> None:
    attention = teacher.model.layers[0].mixer  # a head whose queries are its keys: it looks at itself
    attention.q_proj.weight.data[:16] = 3.0 * attention.k_proj.weight.data[:16]
    student = mambify.convert(teacher, mixer=mixer, init="distance", calibration=blocks())
    sample = sampled(teacher)
    ours = mixer_of(student)
    if mixer == "mamba2":
        kept = torch.exp(-ours.A_log.exp() * F.softplus(ours.dt_bias))
        assert ours.rows.dt.abs().max() == 0
    else:
        step = F.softplus(ours.dt_proj.bias)[:, None]
        kept = torch.exp(-ours.A_log.exp() * step).view(4, -1).unique(dim=1)[:, 0]
        assert torch.allclose(torch.exp(-ours.A_log.exp() * step).view(4, -1), kept[:, None].expand(4, 16 * 16))
        assert ours.dt_proj.weight.abs().max() == 0
    assert torch.allclose(kept**sample.half_distance_H, torch.full((4,), 0.5), atol=1e-4)
    assert len(sample.half_distance_H.unique()) > 1


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_the_gate_is_nearly_constant(teacher: HybridForCausalLM, mixer: str) -> None:
    # Normed states whose mean is a direction of their own, as in a trained model.
    teacher.model.embed_tokens.weight.data[:, 0] = 3.0
    student = mambify.convert(teacher, mixer=mixer, init="open-gate", calibration=blocks())
    z = sampled(teacher, ids=blocks(seed=1)).input_BTD @ mixer_of(student).rows.z.T
    assert z.mean().item() == pytest.approx(1.0, abs=0.02)
    assert z.std() < 0.1
    drawn = sampled(teacher).input_BTD @ mixer_of(mambify.convert(teacher, mixer=mixer)).rows.z.T
    assert drawn.std() > 0.3


def test_queries_are_turned_by_the_mean_rotation(tiny_teacher: Teacher, tmp_path: Path) -> None:
    """Linear scores without positions equal the mean over lags of the scores with RoPE's rotation."""
    teacher = load(tiny_teacher, tmp_path, "llama-biased")
    student = mambify.convert(teacher, init="rotation", calibration=blocks())
    sample, ours, attention = sampled(teacher), mixer_of(student), teacher.model.layers[0].mixer
    x = sample.input_BTD[0, :5]
    bias = ours.conv1d.bias.split(ours.conv_split)
    queries = (x @ ours.rows.C.T + bias[2]).view(5, 4, 16)
    keys = (x @ ours.rows.B.T + bias[1]).view(5, 2, 16).repeat_interleave(2, 1)
    q, k = (p(x).view(5, -1, 16) for p in (attention.q_proj, attention.k_proj))
    k = k.repeat_interleave(2, 1)
    expected = torch.zeros(5, 5, 4)
    for lag in range(sample.lags_HL.shape[1]):
        cos, sin = sample.cos_LJ[lag].repeat(2), sample.sin_LJ[lag].repeat(2)
        turned = q * cos + torch.cat([-q[..., 8:], q[..., :8]], -1) * sin
        expected += sample.lags_HL[:, lag] * torch.einsum("thp,shp->tsh", turned, k)
    assert torch.allclose(torch.einsum("thp,shp->tsh", queries, keys), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@torch.no_grad()
def test_scale_is_the_best_one(teacher: HybridForCausalLM, mixer: str) -> None:
    """The best further factor of every head is 1."""
    student = mambify.convert(teacher, mixer=mixer, init="scale", calibration=blocks())
    sample, ours, attention = sampled(teacher), mixer_of(student), teacher.model.layers[0].mixer
    features: list[Tensor] = []
    hook = ours.out_proj.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    ours(sample.input_BTD, MixerContext(), None)
    hook.remove()
    factor = (ours.out_proj.weight / attention.o_proj.weight).view(-1, 4, 16).mean((0, 2))
    scaled = features[0].unflatten(-1, (4, 16)) * factor[:, None]
    best = (scaled * sample.heads_BTHP).sum((0, 1, 3)) / scaled.square().sum((0, 1, 3))
    assert torch.allclose(best, torch.ones(4), atol=1e-3)
    assert (factor - 1).abs().max() > 0.05


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@torch.no_grad()
def test_what_enters_the_activation_is_calm(teacher: HybridForCausalLM, mixer: str) -> None:
    student = mambify.convert(teacher, mixer=mixer, init="near-linear", calibration=blocks())
    ours, x = mixer_of(student), sampled(teacher).input_BTD
    values = x @ ours.rows.x.T
    if mixer == "mamba2":
        values = values * ours.conv1d.weight[: values.shape[-1], 0, -1]
    else:
        values = ours._repeat_heads(values) * ours.conv1d.weight[:, 0, -1]
    rms = values.unflatten(-1, (-1, 16)).square().mean((0, 1, 3)).sqrt()
    assert torch.allclose(rms, torch.full_like(rms, 0.2), atol=1e-3)


@torch.no_grad()
def test_measured_enters_the_norm_at_its_bend(teacher: HybridForCausalLM) -> None:
    student = mambify.convert(teacher, init="measured", calibration=blocks())
    ours, sample = mixer_of(student), sampled(teacher)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = ours.norm.register_forward_pre_hook(lambda _, args: seen.append(args))
    ours(sample.input_BTD, MixerContext(), None)
    hook.remove()
    y, z = seen[0]
    rms = (y * F.silu(z)).square().mean((0, 1, 3)).sqrt()
    assert torch.allclose(rms, torch.full_like(rms, math.sqrt(ours.norm.eps)), rtol=0.02)
    kept = torch.exp(-ours.A_log.exp() * F.softplus(ours.dt_bias))
    assert torch.allclose(kept**sample.half_distance_H, torch.full((4,), 0.5), atol=1e-3)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@pytest.mark.parametrize("init", MEASURED)
def test_every_initialisation_is_whole_and_repeatable(teacher: HybridForCausalLM, init: str, mixer: str) -> None:
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    one, two = (mambify.convert(teacher, mixer=mixer, init=init, calibration=blocks()) for _ in range(2))
    for name, value in one.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, two.state_dict()[name]), name
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    stock = mambify.convert(teacher, mixer=mixer).state_dict()
    assert {name: value.shape for name, value in one.state_dict().items()} == {n: v.shape for n, v in stock.items()}
    other = mambify.convert(teacher, mixer=mixer, init=init, calibration=blocks(seed=5)).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_every_family_takes_the_measured_start(
    tiny_teacher: Teacher, teacher_kind: str, tmp_path: Path, mixer: str
) -> None:
    teacher = load(tiny_teacher, tmp_path, teacher_kind)
    ids = blocks()
    plain, fitted = (mambify.convert(teacher, mixer=mixer, init=i, calibration=ids) for i in ("identity", "measured"))
    assert error(fitted, teacher, ids) < min(error(plain, teacher, ids), 1.0)


def test_a_teacher_given_up_is_measured_just_the_same(teacher: HybridForCausalLM) -> None:
    planned = plan(teacher.config, init="measured")
    kept = apply_plan(teacher, planned, calibration=blocks()).state_dict()
    freed = apply_plan(teacher, planned, calibration=blocks(), release=True).state_dict()
    assert all(torch.equal(value, freed[name]) for name, value in kept.items())
    assert not hasattr(teacher.model.layers[0], "mixer")


def test_bfloat16_teacher(tiny_teacher: Teacher, tmp_path: Path) -> None:
    tiny_teacher("llama3").bfloat16().save_pretrained(tmp_path)
    teacher = mambify.load(tmp_path).model
    student = mambify.convert(teacher, init="measured", calibration=blocks())
    assert mixer_of(student).in_proj.weight.dtype == torch.bfloat16
    assert error(student, teacher, blocks()) < 1.0


@pytest.mark.parametrize("init", MEASURED)
def test_without_text_nothing_is_loaded(init: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"'{init}' is measured on text: give some .--calibration-text FILE"):
        mambify.convert("no/such-teacher", init=init)


def test_on_the_real_teacher(smollm2: LoadedModel, shared_data: Path) -> None:
    """Before any training, on other text than was measured on, ``measured`` is nearer than ``identity``."""
    rows = (shared_data / "lm_text" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    ids = smollm2.tokenizer("\n".join(json.loads(row)["text"] for row in rows))["input_ids"]
    calibration, ids = torch.tensor(ids[:1536]).view(-1, 256), torch.tensor(ids[1536:1792])[None]
    layers = [i for i in range(30) if i not in (4, 12, 20)]
    found = {
        init: divergence(
            mambify.convert(smollm2, attention_layers=layers, init=init, calibration=calibration), smollm2.model, ids
        )
        for init in ("identity", "measured")
    }
    assert found["measured"] < 0.5 * found["identity"], found
