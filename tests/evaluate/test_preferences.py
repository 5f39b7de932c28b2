"""Accuracy over preference pairs against sums made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mambify.errors import TokenizerMismatchError, UsageError
from mambify.evaluate.preferences import as_json, preference_accuracy, preference_table
from mambify.model import HybridForCausalLM

MakeHybrid = Callable[..., HybridForCausalLM]
Pair = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture
def pairs() -> list[Pair]:
    """Prompts of 3 tokens, answers of 2 to 9."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(12):
        prompt = torch.randint(3, 96, (3,), generator=generator)
        rows = []
        for length in torch.randint(2, 10, (2,), generator=generator).tolist():
            ids = torch.cat([prompt, torch.randint(3, 96, (length,), generator=generator)])
            labels = ids.clone()
            labels[:3] = -100
            rows.append({"input_ids": ids, "labels": labels})
        found.append((rows[0], rows[1]))
    return found


@torch.no_grad()
def _logp(model: HybridForCausalLM, row: dict[str, torch.Tensor]) -> float:
    ids = row["input_ids"]
    logp = model(input_ids=ids[None]).logits[0, 2:-1].log_softmax(-1)
    return float(logp.gather(1, ids[3:, None]).sum())


def test_shares_are_those_of_sums_made_by_hand(tiny_hybrid: MakeHybrid, pairs: list[Pair]) -> None:
    model, reference = tiny_hybrid(seed=0), tiny_hybrid(("attention",) * 4, seed=1)
    score = preference_accuracy(model, reference, pairs, batch_size=5, resamples=200)
    ours = [[_logp(model, row) for row in pair] for pair in pairs]
    theirs = [[_logp(reference, row) for row in pair] for pair in pairs]
    lengths = [[len(row["input_ids"]) - 3 for row in pair] for pair in pairs]
    margins = [(a - c) - (b - d) for (a, b), (c, d) in zip(ours, theirs, strict=True)]
    assert score.num_pairs == 12
    assert score.accuracy.value == pytest.approx(sum(a > b for a, b in ours) / 12)
    per_token = [a / m > b / n for (a, b), (m, n) in zip(ours, lengths, strict=True)]
    assert score.accuracy_per_token.value == pytest.approx(sum(per_token) / 12)
    assert score.reward_accuracy is not None and score.margin is not None and score.reference_accuracy is not None
    assert score.reward_accuracy.value == pytest.approx(sum(m > 0 for m in margins) / 12)
    assert score.margin.value == pytest.approx(sum(margins) / 12, rel=1e-4)
    assert score.reference_accuracy.value == pytest.approx(sum(a > b for a, b in theirs) / 12)
    assert 0 <= score.accuracy.low <= score.accuracy.value <= score.accuracy.high <= 1
    assert preference_table({"pairs": as_json(score)}).row_count == 5


def test_a_model_gains_nothing_on_itself(tiny_hybrid: MakeHybrid, pairs: list[Pair]) -> None:
    model = tiny_hybrid()
    score = preference_accuracy(model, model, pairs, resamples=10)
    assert score.reward_accuracy is not None and score.reward_accuracy.value == 0.5
    alone = preference_accuracy(model, None, pairs, resamples=10)
    assert alone.reward_accuracy is None and alone.accuracy == score.accuracy


def test_what_cannot_be_scored_is_refused(tiny_hybrid: MakeHybrid, pairs: list[Pair]) -> None:
    model = tiny_hybrid()
    with pytest.raises(UsageError, match="no pair"):
        preference_accuracy(model, None, [])
    with pytest.raises(TokenizerMismatchError):
        preference_accuracy(model, tiny_hybrid(vocab_size=80), pairs)
    silent = {name: tensor[:3] for name, tensor in pairs[0][0].items()}
    with pytest.raises(UsageError, match="an answer without a token"):
        preference_accuracy(model, None, [(silent, pairs[0][1])])
