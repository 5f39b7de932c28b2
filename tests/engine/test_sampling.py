from __future__ import annotations

from typing import Any

import pytest
import torch

from mambify.engine import Sampling
from mambify.errors import InvalidOptionError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.1}, "min_p must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        Sampling(**settings)


def test_seeds() -> None:
    assert len(set(Sampling(seed=3).seeds(5))) == 5
    assert Sampling(seed=[4, 3]).seeds(2)[1] == Sampling(seed=3).seeds(1)[0]
    with pytest.raises(InvalidOptionError, match="2 seeds for 3 rows"):
        Sampling(seed=(1, 2)).seeds(3)
    torch.manual_seed(5)
    first = Sampling().seeds(2)
    assert Sampling().seeds(2) != first
    torch.manual_seed(5)
    assert Sampling().seeds(2) == first
