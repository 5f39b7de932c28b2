from __future__ import annotations

import pytest
import torch

from mambify.decode import Sampling

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.0, 2.5]])


def test_at_temperature_zero_all_of_it_is_on_the_likeliest() -> None:
    assert Sampling(0.0).probabilities(LOGITS).tolist() == [[0, 0, 0, 0, 1]]


def test_the_models_own_distribution_at_temperature_one() -> None:
    assert torch.equal(Sampling(1.0).probabilities(LOGITS), LOGITS.softmax(-1))


def test_top_k_and_top_p_cut_and_renormalise() -> None:
    kept = Sampling(0.7, top_k=2).probabilities(LOGITS)[0]
    wanted = (LOGITS[0, [1, 4]] / 0.7).softmax(-1)
    assert kept.nonzero()[:, 0].tolist() == [1, 4]
    assert torch.allclose(kept[[1, 4]], wanted)
    # 0.53, 0.32, 0.12, …: 0.8 is reached with the second
    assert Sampling(1.0, top_p=0.8).probabilities(LOGITS)[0].nonzero()[:, 0].tolist() == [1, 4]
    assert Sampling(1.0, top_p=0.5).probabilities(LOGITS)[0].nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.5, top_k=3), Sampling(1.0, top_p=0.9)])
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = sampling.draw(LOGITS.expand(20_000, -1), generator)
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    # 4 standard deviations of a share at 20,000 draws are at most 0.0142
    assert (shares - sampling.probabilities(LOGITS)[0]).abs().max() < 0.0142
