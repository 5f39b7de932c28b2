"""Budgets are kept to, and the choice within one is the best there is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mambify import HybridConfig
from mambify.conversion import plan, state_bytes
from mambify.errors import InvalidOptionError
from mambify.selection import best_within, budgeted_layers, count_for_share, top_layers
from mambify.workflows.select import Budget


def config(**changes: object) -> HybridConfig:
    facts = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    return HybridConfig(**facts | changes)


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_is_the_best_of_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = dict(enumerate((torch.rand(7, generator=generator) - 0.2).tolist()))
    costs = dict(enumerate(torch.randint(0, 9, (7,), generator=generator).tolist()))
    choices = [c for n in range(8) for c in combinations(range(7), n) if sum(costs[i] for i in c) <= 15]
    best = max(sum(worth[i] for i in c) for c in choices)
    chosen = best_within(worth, costs, 15)
    assert sum(costs[i] for i in chosen) <= 15
    assert sum(worth[i] for i in chosen) == pytest.approx(best)


def test_a_share_keeps_as_many_as_the_even_spread() -> None:
    assert [count_for_share(30, share) for share in (0.0, 0.125, 0.25, 0.5, 1.0)] == [0, 3, 7, 15, 30]
    with pytest.raises(InvalidOptionError, match="out of range"):
        count_for_share(30, 1.5)
    assert top_layers({0: 0.5, 1: 0.1, 2: 0.5, 3: 0.9}, 2) == [2, 3]
    assert top_layers({0: 0.5, 1: 0.1}, 0) == []


@pytest.mark.parametrize("context", [512, 4096])
@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_memory_is_kept_to(mixer: str, context: int) -> None:
    model, worth = config(), {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.4, 4: 0.8, 5: 0.2}
    least, most = (
        state_bytes(plan(model, mixer=mixer, attention_layers=kept).student, context) for kept in ([], [0, 4])
    )
    chosen = budgeted_layers(model, worth, mixer=mixer, context=context, max_bytes=most)
    assert chosen == [0, 4]
    assert budgeted_layers(model, worth, mixer=mixer, context=context, max_bytes=most - 1) == [0]
    assert budgeted_layers(model, worth, mixer=mixer, context=context, max_bytes=least) == []
    with pytest.raises(InvalidOptionError, match=f"without any attention a sequence holds {least}"):
        budgeted_layers(model, worth, mixer=mixer, context=context, max_bytes=least - 1)


def test_a_window_is_cheap() -> None:
    """Three sliding layers fit where one full layer does not; they win together though each is worth less."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    model = config(sliding_window=256, layer_types=kinds)
    worth = {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.4, 4: 0.4, 5: 0.4}
    budget = state_bytes(plan(model, attention_layers=[3, 4, 5]).student, 4096)
    assert budgeted_layers(model, worth, mixer="mamba2", context=4096, max_bytes=budget) == [3, 4, 5]


def test_the_control_is_what_a_share_converts_to() -> None:
    model = config(num_hidden_layers=30)
    assert list(Budget(share=0.25).spread(model, "mamba2")) == plan(model, attention=0.25).student.attention_layers
    assert Budget(max_bytes=10**12).spread(model, "mamba2") == tuple(range(30))
