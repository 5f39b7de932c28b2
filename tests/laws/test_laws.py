"""The laws of speculation at small scale; ``mambify bench laws`` tries them on hundreds of thousands of tokens."""

from __future__ import annotations

import pytest
import torch

from mambify.bench import laws
from mambify.bench.shapes import model_of_shape
from mambify.engine import Sampling

SIZE = laws.Size(prompts=8, new=16, samples=1500, slots=1500)


@pytest.mark.parametrize("name", laws.TRIALS)
def test_what_is_drawn_is_distributed_as_the_target(name: str) -> None:
    found = laws.distribution(name, "cpu", SIZE)
    assert found["passes"], found
    assert found["impossible"] == 0 or found["damaged"]
    if name == "none accepted":
        assert sum(found["accepted"][1:]) == 0
    if name == "all accepted":  # but for answers that end first
        assert found["accepted"][1] == found["accepted"][2] == 0
    if name == "rounds without drafts":
        assert found["accepted"][0] > 0


def test_greedy_tokens_are_the_targets_by_steps_and_in_one_pass() -> None:
    target = model_of_shape("tiny", "cpu", torch.float32, attention=0.5, seed=0, initializer_range=0.3)
    draft = model_of_shape("tiny", "cpu", torch.float32, seed=1, num_hidden_layers=2)
    prompts = [[5, 6, 7], [9], list(range(30, 60))]
    for other in ("lookup", draft, target):
        found = laws.greedy(target, other, prompts, new=20)
        assert found["passes"] and found["differing_prompts"] == 0
        assert found["not_likeliest_in_one_pass"] == 0
    assert found["tokens_per_round"] > 3.5


def test_a_damaged_ring_is_noticed() -> None:
    target = model_of_shape("tiny", "cpu", torch.float32, attention=0.0, seed=0, initializer_range=0.3)
    found = laws.greedy(target, "lookup", [[5, 6, 7], [9, 8]], new=48, damaged=True)
    assert found["differing_prompts"] > 0 and found["logit_gap_most"] > 0


def test_exact_probabilities_add_up() -> None:
    target = model_of_shape("tiny", "cpu", torch.float32, vocab_size=5, seed=0, initializer_range=0.3)
    for stops in ([], [4]):
        exact = laws.exact_probabilities(target, Sampling(top_k=3), stops)
        assert sum(exact.values()) == pytest.approx(1.0)
        assert all(len(answer) == 6 or answer[-1] == 4 for answer in exact)
        assert len(exact) == 3**6 or stops
