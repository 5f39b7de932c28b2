"""Which layers a conversion touches, what it costs, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import mambify
from mambify import HybridConfig, HybridForCausalLM
from mambify.conversion import count_parameters, plan, state_bytes
from mambify.conversion.plan import uniform_attention_layers
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.families.load import load_config

Teacher = Callable[..., PreTrainedModel]
Hybrid = Callable[..., HybridForCausalLM]


def config(layers: int = 16, **changes: Any) -> HybridConfig:
    facts: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return HybridConfig(num_hidden_layers=layers, **facts | changes)


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.5, [1, 3, 5, 7, 9, 11, 13, 15]),
        (0.25, [3, 7, 11, 15]),
        (0.125, [7, 15]),
        (0.0, []),
        (1.0, list(range(16))),
        (0.75, [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]),
    ],
)
def test_shares_of_the_paper(share: float, kept: list[int]) -> None:
    assert uniform_attention_layers(16, share) == kept
    planned = plan(config(), attention=share)
    assert planned.student.attention_layers == kept
    assert planned.converted == tuple(i for i in range(16) if i not in kept)
    assert planned.teacher.attention_layers == list(range(16))


@given(layers=st.integers(1, 200), share=st.floats(0, 1))
def test_any_share_is_spread_evenly(layers: int, share: float) -> None:
    kept = uniform_attention_layers(layers, share)
    assert kept == sorted(set(kept))
    assert abs(len(kept) - layers * share) <= 1
    if len(kept) > 1:
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1


@given(layers=st.integers(1, 64))
def test_progressive_shares_are_nested(layers: int) -> None:
    """The steps 87.5%, 75%, 50%, 25%, 12.5%, 0% convert further what the last one left."""
    previous = set(range(layers))
    for share in (0.875, 0.75, 0.5, 0.25, 0.125, 0.0):
        kept = set(uniform_attention_layers(layers, share))
        assert kept <= previous
        previous = kept


def test_explicit_layers() -> None:
    planned = plan(config(6), attention_layers=[5, 0, 2, 2], mixer="mamba1")
    assert planned.student.layer_mixers == ["attention", "mamba1", "attention", "mamba1", "mamba1", "attention"]
    assert planned.student.layer_types == ["full_attention" if i in (0, 2, 5) else "linear_attention" for i in range(6)]
    assert plan(config(6), attention_layers=[]).student.attention_layers == []


def test_sliding_layers_keep_their_kind() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    planned = plan(config(4, sliding_window=8, layer_types=kinds), attention_layers=[0, 1])
    assert planned.student.layer_types == [
        "full_attention",
        "sliding_attention",
        "linear_attention",
        "linear_attention",
    ]


def test_the_given_config_is_not_changed() -> None:
    before = config()
    facts = before.to_dict()
    plan(before, attention=0.25)
    assert before.to_dict() == facts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": 1.5}, "attention 1.5 is out of range.*0 to 1"),
        ({"attention": -0.1}, "out of range"),
        ({"attention": math.nan}, "out of range"),
        ({"attention_layers": [3, 16]}, "layer 16 is out of range: this model has layers 0 to 15"),
        ({"attention_layers": [-1]}, "layer -1 is out of range"),
        ({"mixer": "mamba3"}, "unknown mixer 'mamba3': did you mean 'mamba"),
        ({"mixer": "attention"}, "unknown mixer 'attention'"),
        ({"init": "identty"}, "unknown initialisation 'identty': did you mean 'identity'"),
        ({"mixer": "mamba1", "init": "x"}, "unknown initialisation 'x': known: distance, identity, least-squares, "),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        plan(config(), **arguments)


def test_a_shape_that_a_mixer_cannot_take() -> None:
    with pytest.raises(UnsupportedError, match="mamba1 needs a head dimension that is a multiple of 16"):
        plan(config(head_dim=24), mixer="mamba1")
    plan(config(head_dim=24), mixer="mamba1", attention=1.0)


def test_converting_further() -> None:
    first = plan(config(8), attention=0.75).student
    second = plan(first, attention=0.25, mixer="mamba1")
    assert second.student.layer_mixers == ["mamba1", "mamba1", "mamba2", "attention"] * 2
    assert second.converted == (0, 1, 4, 5)
    with pytest.raises(InvalidOptionError, match="layer 2 is mamba2 already and cannot keep attention"):
        plan(first, attention_layers=[1, 2])


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@pytest.mark.parametrize("kind", ["llama3", "smollm2-like", "qwen2", "qwen3", "qwen3-tied"])
def test_parameters_are_counted_right(tiny_teacher: Teacher, tmp_path: Path, kind: str, mixer: str) -> None:
    tiny_teacher(kind).save_pretrained(tmp_path)
    counted = count_parameters(plan(load_config(tmp_path), mixer=mixer, attention=0.25))
    student = mambify.convert(tmp_path, mixer=mixer, attention=0.25)
    assert counted.total == student.num_parameters()
    assert counted.new == sum(p.numel() for i in (0, 1, 2) for p in student.model.layers[i].mixer.parameters())
    assert counted.kept == counted.total - counted.new


def bytes_in_cache(model: HybridForCausalLM, length: int) -> int:
    ids = torch.randint(3, 90, (1, length))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    tensors = []
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            tensors += [layer.keys, layer.values]
        else:
            tensors += [layer.conv_states[0], layer.recurrent_states[0]]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 6}, {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 2}],
    ids=["full", "sliding", "mixed"],
)
@pytest.mark.parametrize("mixers", [["mamba2", "attention", "mamba1", "attention"], ["attention"] * 4])
def test_state_bytes_are_those_of_the_cache(
    tiny_hybrid: Hybrid, tmp_path: Path, mixers: list[str], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    path = mambify.save(tiny_hybrid(mixers, **changes).to(dtype), tmp_path / "m")
    model, described = mambify.load(path).model, load_config(path)
    for length in (3, 5, 6, 7, 40):
        assert state_bytes(described, length) == bytes_in_cache(model, length), length
    assert state_bytes(model.config, 40) == state_bytes(described, 40)
