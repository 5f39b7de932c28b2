"""An unconverted teacher gives transformers' own logits, whatever the family and however it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mambify
from mambify import HybridForCausalLM

TOLERANCE = 1e-4
TOKENS = 40  # beyond every sliding window, and beyond llama3's original context of 32

Teacher = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def pair(
    teacher_kind: str, tiny_teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, HybridForCausalLM]:
    theirs = tiny_teacher(teacher_kind)
    directory = tmp_path_factory.mktemp(teacher_kind)
    theirs.save_pretrained(directory)
    return theirs, mambify.load(directory).model


def tokens(batch: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@torch.no_grad()
def test_logits(pair: tuple[PreTrainedModel, HybridForCausalLM]) -> None:
    theirs, ours = pair
    ids = tokens(2)
    expected = theirs(ids).logits
    assert expected.std() > 0.1  # else anything is equal
    assert difference(ours(ids).logits, expected) <= TOLERANCE


@torch.no_grad()
def test_every_special_field_matters(pair: tuple[PreTrainedModel, HybridForCausalLM], teacher_kind: str) -> None:
    """The test above could not see a field that changes nothing on these models; so each is taken away in turn."""
    _, ours = pair
    ids = tokens(1)
    expected = ours(ids).logits
    if teacher_kind == "llama3":
        ours.model.rotary_emb.inv_freq.mul_(1.5)
        changed = ours(ids).logits
        ours.model.rotary_emb.inv_freq.div_(1.5)
        assert difference(changed, expected) > 100 * TOLERANCE
    elif ours.config.sliding_window:
        layers = [layer.mixer.attend for layer in ours.model.layers if layer.mixer.attend.sliding_window]
        assert 0 < len(layers) <= 4
        kinds = list(ours.config.layer_types)
        ours.config.layer_types = ["full_attention"] * 4
        changed = ours(ids).logits
        ours.config.layer_types = kinds
        assert difference(changed, expected) > 100 * TOLERANCE
    else:
        one_dimensional = [p for p in ours.parameters() if p.dim() == 1]
        assert all(p.std() > 0.01 for p in one_dimensional)


@torch.no_grad()
def test_left_padding(pair: tuple[PreTrainedModel, HybridForCausalLM]) -> None:
    theirs, ours = pair
    ids, mask = tokens(3), torch.ones(3, TOKENS, dtype=torch.long)
    for row, padding in enumerate((0, 5, 17)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    logits = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert difference(logits[mask.bool()], expected[mask.bool()]) <= TOLERANCE


@torch.no_grad()
def test_cached_decoding(pair: tuple[PreTrainedModel, HybridForCausalLM]) -> None:
    theirs, ours = pair
    ids = tokens(2)
    expected = theirs(ids).logits
    cache, parts = None, []
    for start, end in [(0, 9), (9, 10), (10, 11), (11, 30), (30, 31), *((i, i + 1) for i in range(31, TOKENS))]:
        output = ours(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert difference(torch.cat(parts, 1), expected) <= TOLERANCE


def test_greedy_generation(pair: tuple[PreTrainedModel, HybridForCausalLM]) -> None:
    theirs, ours = pair
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids, **arguments), theirs.generate(ids, **arguments))


@torch.no_grad()
def test_sharded_checkpoint_and_dtype(tiny_teacher: Teacher, tmp_path: Path) -> None:
    theirs = tiny_teacher("qwen3-tied")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours, ids = mambify.load(tmp_path).model, tokens(1)
    assert difference(ours(ids).logits, theirs(ids).logits) <= TOLERANCE

    theirs.bfloat16().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in mambify.load(tmp_path / "half").model.parameters()} == {torch.bfloat16}
    half = mambify.load(tmp_path / "half", dtype="bfloat16").model
    assert half.config.dtype == torch.bfloat16
    assert difference(half(ids).logits, theirs(ids).logits) <= 0.05
    assert {p.dtype for p in mambify.load(tmp_path / "half", dtype=torch.float32).model.parameters()} == {torch.float32}


@torch.no_grad()
def test_padding_as_generate_would_place_it(pair: tuple[PreTrainedModel, HybridForCausalLM]) -> None:
    """A 2D mask that grows with a cache: the padded row equals the same row alone."""
    _, ours = pair
    ids = tokens(1, 20)
    alone = ours(ids).logits[:, -8:]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first = ours(padded[:, :18], attention_mask=mask[:, :18], position_ids=positions[:, :18], use_cache=True)
    parts, cache = [], first.past_key_values
    for t in range(18, 26):
        output = ours(
            padded[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=positions[:, t : t + 1],
            past_key_values=cache,
        )
        parts.append(output.logits)
        cache = output.past_key_values
    assert difference(torch.cat(parts, 1), alone) <= TOLERANCE
