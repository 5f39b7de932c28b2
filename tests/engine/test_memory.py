"""What does not fit is refused before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mambify
from mambify.engine import DecodeEngine, Sampling, Speculator, memory
from mambify.engine.memory import read_bytes, slot_bytes
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel
from mambify.machine import free_memory, memory_bandwidth
from mambify.mixers import ReplayState
from mambify.mixers.attention import SlotKV
from mambify.model import HybridForCausalLM

Hybrid = Callable[..., HybridForCausalLM]
LAYERS = ["mamba2", "attention", "mamba1", "attention"]


@pytest.mark.parametrize("most_new", [2, 5, 17])
def test_a_slot_is_counted_as_it_is(tiny_hybrid: Hybrid, most_new: int) -> None:
    model = tiny_hybrid(LAYERS)
    active_S = torch.zeros(3, dtype=torch.bool)
    tower = Tower(model, num_slots=3, length=50, most_new=most_new, active_S=active_S)
    taken = 0
    for state in tower.states:
        if isinstance(state, SlotKV):
            taken += state.keys_SGLP.nbytes + state.values_SGLP.nbytes
        else:
            assert isinstance(state, ReplayState)
            taken += state.conv.nbytes + state.ssm.nbytes + sum(part.nbytes for part in state.ring)
    assert 3 * slot_bytes(model, length=50, most_new=most_new) == taken


def test_a_batch_larger_than_memory(tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hybrid(LAYERS)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000_000)
    settings: dict[str, Any] = {"max_length": 100, "sampling": Sampling(0.0)}
    with pytest.raises(
        InvalidOptionError, match=r"1000 sequences of 100 tokens need .* at most \d+ of them fit"
    ) as told:
        Speculator(model, model, num_slots=1000, **settings)
    most = int(str(told.value).split("at most ")[1].split()[0])
    assert 10 < most < 1000
    Speculator(model, model, num_slots=most, **settings)
    with pytest.raises(InvalidOptionError, match=f"at most {most} of them"):
        Speculator(model, model, num_slots=most + 1, **settings)
    assert memory.most_slots([model, model], length=100, most_new=5, free=10_000_000) == most
    with pytest.raises(InvalidOptionError, match="at most"):
        DecodeEngine(model, num_slots=1000, max_length=1000, sampling=Sampling(), stop_ids=[])


def test_a_context_larger_than_memory(tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000_000)
    with pytest.raises(InvalidOptionError, match=r"one sequence of at most \d+ tokens fits") as told:
        Speculator(tiny_hybrid(LAYERS), None, num_slots=1, max_length=10**6, sampling=Sampling())
    most = int(str(told.value).split("at most ")[1].split()[0])
    Speculator(tiny_hybrid(LAYERS), None, num_slots=1, max_length=most, sampling=Sampling())
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(InvalidOptionError, match="not even an empty one fits"):
        Speculator(tiny_hybrid(LAYERS), None, num_slots=1, max_length=10, sampling=Sampling())


def test_generate_says_so_before_any_work(smollm2: LoadedModel) -> None:
    """In the machine's real memory: a million rows are more than it has."""
    if free_memory("cpu") is None:
        pytest.skip("this system does not tell its free memory")
    with pytest.raises(InvalidOptionError, match=r"1000000 sequences of 66 tokens need .* GB are free on cpu: at most"):
        mambify.generate(smollm2.model, [[5, 6]] * 1_000_000)


def test_bytes_of_a_step(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid(["attention", "mamba2"])
    embeddings = model.model.embed_tokens.weight.nbytes + model.model.norm.weight.nbytes
    weights = sum(weight.nbytes for weight in model.parameters()) - embeddings
    assert read_bytes(model) - weights == slot_state(model)
    grown = read_bytes(model, num_slots=3, length=10) - weights
    assert grown == 3 * (slot_state(model) + 10 * 2 * 2 * 16 * 4)  # keys and values of 2 heads of 16


def slot_state(model: HybridForCausalLM) -> int:
    return type(model.model.layers[1].mixer).state_bytes(model.config, 0, 4)  # type: ignore[operator, union-attr]


def test_bandwidth_is_measured_once() -> None:
    measured = memory_bandwidth("cpu")
    assert 1e8 < measured < 1e13
    assert memory_bandwidth("cpu") == measured
