"""Expected acceptance against what speculation measures, and where both are known."""

from __future__ import annotations

import pytest
import torch

from mambify.conversion.cut import cut
from mambify.decode import generate
from mambify.errors import InvalidOptionError
from mambify.evaluate.acceptance import expected_acceptance, measured_acceptance
from mambify.families.load import load
from mambify.model import HybridForCausalLM
from tiny import llama


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    path = tmp_path_factory.mktemp("target")
    llama(16, initializer_range=0.15, eos_token_id=None).save_pretrained(path)
    return load(path).model


def written(target: HybridForCausalLM, rows: int, length: int) -> torch.Tensor:
    """Texts that the target writes at temperature 1."""
    start = torch.randint(16, (rows, 1), generator=torch.Generator().manual_seed(0))
    return generate(target, start, max_new_tokens=length - 1, temperature=1.0, seed=0, eos_token_id=[])


@pytest.mark.parametrize("words", [16, 6])
def test_the_expectation_is_what_speculation_measures(target: HybridForCausalLM, words: int) -> None:
    """On texts that the target wrote; rounds begin elsewhere than at every place alike, hence some slack."""
    draft = cut(target, 3, token_ids=torch.arange(words) if words < 16 else None)
    texts = written(target, 256, 32)
    expected = expected_acceptance(target, draft, texts, texts, num_draft_tokens=3)
    measured = measured_acceptance(
        target, draft, [row[:2].tolist() for row in texts], num_draft_tokens=3, temperature=1.0,
        max_new_tokens=60, stop_ids=[], num_slots=256,
    )  # fmt: skip
    assert measured["tokens_per_round"] == pytest.approx(expected.tokens_per_round, rel=0.05)
    for k, share in enumerate(expected.acceptance_by_position):
        assert measured["acceptance_by_position"][k] == pytest.approx(share, abs=0.06)
    assert 0.05 < expected.acceptance_by_position[0] < 0.95
    assert expected.acceptance_by_position[0] <= expected.known_probability
    assert (expected.known_probability == pytest.approx(1.0)) == (words == 16)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_model_accepts_all_of_its_own(target: HybridForCausalLM, temperature: float) -> None:
    texts = written(target, 4, 20)
    found = expected_acceptance(target, target, texts, texts, num_draft_tokens=4, temperature=temperature)
    assert found.tokens_per_round == pytest.approx(5.0, abs=1e-4)
    assert found.positions == 4 * (19 - 3)


def test_only_counted_tokens_count(target: HybridForCausalLM) -> None:
    texts = written(target, 4, 20)
    draft = cut(target, 2)
    labels = texts.clone()
    labels[:, :10] = -100
    half = expected_acceptance(target, draft, texts, labels, num_draft_tokens=2)
    assert half.positions == 4 * 9
    with pytest.raises(InvalidOptionError, match="are counted"):
        expected_acceptance(target, draft, texts, torch.full_like(texts, -100), num_draft_tokens=2)
    with pytest.raises(InvalidOptionError, match="too short for 20"):
        expected_acceptance(target, draft, texts, texts, num_draft_tokens=20)
