"""A student around its teacher: what is shared, what is new, what stays as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.conversion import apply_plan, plan
from mambify.errors import InvalidOptionError, UnknownSourceError
from mambify.families.load import LoadedModel
from mambify.mixers.mamba2 import Mamba2Mixer

Teacher = Callable[..., PreTrainedModel]


@pytest.fixture
def directory(tiny_teacher: Teacher, teacher_kind: str, tmp_path: Path) -> Path:
    tiny_teacher(teacher_kind).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def teacher(tiny_teacher: Teacher, tmp_path: Path) -> HybridForCausalLM:
    tiny_teacher("llama-biased").save_pretrained(tmp_path)
    return mambify.load(tmp_path).model


def tokens() -> Tensor:
    return torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(tokens()).logits


def storages(model: torch.nn.Module) -> dict[int, int]:
    """Address → bytes of everything a model holds."""
    held = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_every_family_converts(directory: Path, mixer: str) -> None:
    student = mambify.convert(directory, mixer=mixer)
    assert student.config.layer_mixers == [mixer, "attention"] * 2
    assert not student.training
    assert all(p.isfinite().all() for p in student.parameters())
    out = logits(student)
    assert out.isfinite().all()
    ids = tokens()
    student.train()
    student(ids, labels=ids).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_attention_everywhere_is_the_teacher(directory: Path) -> None:
    teacher = mambify.load(directory).model
    student = mambify.convert(teacher, attention=1.0)
    assert torch.equal(logits(student), logits(teacher))
    assert student.num_converted == 0


@pytest.mark.parametrize("attention", [0.5, 0.0])
def test_kept_weights_are_shared(teacher: HybridForCausalLM, attention: float) -> None:
    student = mambify.convert(teacher, attention=attention)
    ours, theirs = storages(student), storages(teacher)
    new = {address for i in student.config.converted_layers for address in storages(student.model.layers[i].mixer)}
    assert set(ours) - set(theirs) == new
    assert student.model.layers[1].mlp is teacher.model.layers[1].mlp
    assert student.lm_head is teacher.lm_head


def test_teacher_is_not_changed_by_converting(teacher: HybridForCausalLM) -> None:
    before, expected = copy.deepcopy(teacher.state_dict()), logits(teacher)
    config = teacher.config.to_dict()
    student = mambify.convert(teacher, attention=0.0, mixer="mamba1")
    student.set_attn_implementation("eager")
    student.config.use_cache = False
    student.generation_config.temperature = 0.25
    assert teacher.config.to_dict() == config
    assert teacher.generation_config.temperature != 0.25
    assert teacher.config._attn_implementation == "sdpa"
    assert torch.equal(logits(teacher), expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_is_not_changed_by_training_the_new_mixers(teacher: HybridForCausalLM) -> None:
    before, expected = copy.deepcopy(teacher.state_dict()), logits(teacher)
    student = mambify.convert(teacher)
    start = logits(student)
    new = [p for i in student.config.converted_layers for p in student.model.layers[i].mixer.parameters()]
    optimizer, ids = torch.optim.AdamW(new, lr=0.01), tokens()
    student.train()
    for _ in range(3):
        optimizer.zero_grad()
        student(ids, labels=ids).loss.backward()
        optimizer.step()
    assert (logits(student.eval()) - start).abs().max() > 0.1
    assert torch.equal(logits(teacher), expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_loaded_teacher_or_model_or_path(teacher: HybridForCausalLM, tmp_path: Path) -> None:
    expected = mambify.convert(teacher, seed=3).state_dict()
    for source in (LoadedModel(teacher, None, "x", "llama"), tmp_path, str(tmp_path)):
        student = mambify.convert(source, seed=3)
        assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


def test_seed_and_layer_decide_what_is_drawn(teacher: HybridForCausalLM) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = mambify.convert(teacher, attention=0.0), mambify.convert(teacher, attention=0.5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    other = mambify.convert(teacher, attention=0.0, seed=1)
    for layer in (0, 2):  # whatever else is converted
        first, second = (m.model.layers[layer].mixer.state_dict() for m in (one, two))
        assert all(torch.equal(first[name], second[name]) for name in first)
    gates = [m.model.layers[i].mixer.in_proj.weight[:64] for m, i in ((one, 0), (one, 2), (other, 0))]
    assert not torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@pytest.mark.parametrize("init", ["identity", "paper", "random"])
def test_nothing_is_left_uninitialised(teacher: HybridForCausalLM, mixer: str, init: str) -> None:
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        assert torch.empty(3).isnan().all()
        student = mambify.convert(teacher, mixer=mixer, init=init, attention=0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in student.parameters())


def test_progressive_conversion(teacher: HybridForCausalLM) -> None:
    """A hybrid is converted further: what was converted stays, by reference, with its training."""
    half = mambify.convert(teacher, attention=0.5)
    with torch.no_grad():
        half.model.layers[0].mixer.out_proj.weight.mul_(0.5)
    quarter = mambify.convert(half, attention=0.25)
    assert quarter.config.layer_mixers == ["mamba2", "mamba2", "mamba2", "attention"]
    assert quarter.model.layers[0].mixer is half.model.layers[0].mixer
    assert quarter.model.layers[2].mixer is half.model.layers[2].mixer
    at_once = mambify.convert(teacher, attention=0.25)
    assert isinstance(quarter.model.layers[1].mixer, Mamba2Mixer)
    same = quarter.model.layers[1].mixer.state_dict(), at_once.model.layers[1].mixer.state_dict()
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    mixed = mambify.convert(half, attention=0.0, mixer="mamba1")
    assert mixed.config.layer_mixers == ["mamba2", "mamba1"] * 2
    assert logits(mixed).isfinite().all()
    assert half.config.layer_mixers == ["mamba2", "attention"] * 2


def test_bfloat16_teacher(tiny_teacher: Teacher, tmp_path: Path) -> None:
    tiny_teacher("llama3").bfloat16().save_pretrained(tmp_path)
    student = mambify.convert(tmp_path)
    assert student.dtype == torch.bfloat16
    mixer = student.model.layers[0].mixer
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == {"A_log", "dt_bias", "D"}
    assert student.config.dtype == torch.bfloat16
    assert logits(student).dtype == torch.bfloat16
    exact = mambify.convert(tmp_path, dtype="float32")
    assert torch.equal(mixer.in_proj.weight, exact.model.layers[0].mixer.in_proj.weight.bfloat16())


def test_releasing_a_teacher_frees_what_was_replaced(teacher: HybridForCausalLM) -> None:
    expected = mambify.convert(teacher).state_dict()
    student = apply_plan(teacher, plan(teacher.config), release=True)
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    assert [hasattr(layer, "mixer") for layer in teacher.model.layers] == [False, True] * 2


def test_saved_student_is_the_student(teacher: HybridForCausalLM, tmp_path: Path) -> None:
    student = mambify.convert(teacher, attention=0.25)
    again = mambify.load(mambify.save(student, tmp_path / "student"))
    assert torch.equal(logits(again.model), logits(student))
    assert again.family == "llama"


def test_wrong_requests(teacher: HybridForCausalLM) -> None:
    with pytest.raises(InvalidOptionError, match="out of range"):
        mambify.convert(teacher, attention=7)
    with pytest.raises(UnknownSourceError):
        mambify.convert("nothing-of-that-name")


MEMORY = """
import sys, torch, mambify, mambify.conversion.convert, mambify.families.load
from pathlib import Path
torch.set_num_threads(1)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

before = status("VmHWM")
mambify.save(mambify.convert(sys.argv[1], attention=float(sys.argv[2])), sys.argv[3])
print(1024 * (status("VmHWM") - before))
"""


def growth(source: str, attention: float, out: Path) -> int:
    """Bytes by which the peak of a process that converts and saves lies above the one after its imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, source, str(attention), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_of_converting_the_real_teacher(smollm2: LoadedModel, tmp_path: Path) -> None:
    """From the GGUF file to a saved student: at no moment 1.3 times the teacher's size above the interpreter's."""
    teacher_bytes = sum(p.numel() * p.element_size() for p in smollm2.model.parameters())
    assert growth("smollm2", 0.5, tmp_path / "half") <= 1.3 * teacher_bytes
