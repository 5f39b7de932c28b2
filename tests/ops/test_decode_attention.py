from __future__ import annotations

import pytest
import torch

from mambify.ops.backends import HAS_TRITON
from mambify.ops.decode_attention import decode_attention

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "queries"),
    [(9, 3, 64, 1), (9, 3, 64, 3), (9, 3, 64, 17), (4, 1, 24, 1), (4, 1, 24, 17), (6, 6, 16, 3)],
)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_each_row_attends_to_what_it_has_filled(
    backend: str,
    heads: int,
    groups: int,
    head_dim: int,
    queries: int,
    window: int | None,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if parts > 1:
        if backend == "reference":
            pytest.skip("the reference does not divide rows")
        monkeypatch.setattr("mambify.ops.decode_attention.triton._LEAST", 2 if window else 34)
        monkeypatch.setattr("mambify.ops.decode_attention.triton._PROGRAMS", 10**6)
    lengths = [max(length, queries) for length in (1, 4, 64, 65, 100)]
    q = torch.randn(len(lengths), queries, heads, head_dim)
    keys = torch.full((len(lengths), groups, 100, head_dim), float("nan"))
    values = keys.clone()
    expected = []
    for row, length in enumerate(lengths):
        keys[row, :, :length] = torch.randn(groups, length, head_dim)
        values[row, :, :length] = torch.randn(groups, length, head_dim)
        k, v = (t[row, :, :length].double().repeat_interleave(heads // groups, 0) for t in (keys, values))
        score = torch.einsum("thp,hlp->thl", q[row].double(), k) * 0.3
        for query in range(queries):
            end = length - queries + query + 1
            score[query, :, end:] = -torch.inf
            if window is not None:
                score[query, :, : max(end - window, 0)] = -torch.inf
        expected.append(torch.einsum("thl,hlp->thp", score.softmax(-1), v))
    given = (t.to(DEVICE) for t in (q, keys, values, torch.tensor(lengths)))
    q, keys, values, length = given
    actual = decode_attention(q, keys, values, length, scaling=0.3, window=window, backend=backend)
    assert (actual.cpu() - torch.stack(expected)).abs().max() < 1e-5
    counts = torch.zeros(len(lengths) * groups + 1, dtype=torch.int32, device=DEVICE)
    settings = {"scaling": 0.3, "window": window, "more": queries, "counts_X": counts, "backend": backend}
    for _ in range(1 if parts == 1 else 2):  # in one kernel, which leaves its counts as they were
        again = decode_attention(q, keys, values, length - queries, **settings)
        assert (again.cpu() - torch.stack(expected)).abs().max() < 1e-5 and not counts.any()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, keys = torch.randn(2, 1, 4, 8), torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="G dividing H"):
        decode_attention(q, keys, keys, torch.ones(2), scaling=1.0)
    with pytest.raises(ValueError, match="4 int32 zeros"):
        decode_attention(
            q, keys[:, :2], keys[:, :2], torch.ones(2), scaling=1.0, counts_X=torch.zeros(3, dtype=torch.int32)
        )
    with pytest.raises(ValueError, match="lengths_S"):
        decode_attention(q, keys[:, :2], keys[:, :2], torch.ones(3), scaling=1.0)
