"""Speculative acceptance: the law, and everything at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.accept import accept_drafts
from mambify.ops.backends import HAS_TRITON
from mambify.ops.draw import draw_tokens, settings_of
from mambify.ops.draw.reference import weights
from mambify.trimmed_head import columns_of

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]
IDS = ["plain", "temperature", "top_k", "top_p", "min_p", "all"]


def distribution(logits_V: Tensor, cuts: dict[str, Any]) -> Tensor:
    """What :func:`draw_tokens` draws from, ``[V]``."""
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | cuts
    weight_1V = weights(logits_V[None], settings_of(**chosen, rows=1, device=logits_V.device))
    return (weight_1V / weight_1V.sum())[0]


def first_token_law(
    target_TV: Tensor, draft_KV: Tensor | None, samples: int, cuts: dict[str, Any], counts: Tensor | None = None
) -> Tensor:
    """Frequencies of the first token that comes out of a round, over many rounds."""
    K, V = target_TV.shape[0] - 1, target_TV.shape[1]
    if draft_KV is None:
        drafted = torch.randint(V, (samples, K))
    else:
        draws = [
            draw_tokens(row.expand(samples, -1), torch.rand(samples), backend="reference", **cuts) for row in draft_KV
        ]
        drafted = torch.stack(draws, 1)
    kept, token = accept_drafts(
        target_TV.expand(samples, -1, -1),
        None if draft_KV is None else draft_KV.expand(samples, -1, -1),
        drafted,
        torch.rand(samples, K + 1),
        counts,
        backend="reference",
        **cuts,
    )
    out = torch.where(kept > 0, drafted[:, 0], token)
    return torch.bincount(out, minlength=V).double() / samples


@pytest.mark.parametrize("cuts", CUTS, ids=IDS)
@pytest.mark.parametrize("looked_up", [False, True], ids=["drafted", "looked up"])
def test_what_comes_out_is_the_targets_own(cuts: dict[str, Any], looked_up: bool) -> None:
    """Total variation below 0.01 over 200,000 rounds; 16 words give about 0.003 by chance."""
    torch.manual_seed(0)
    target, draft = 1.5 * torch.randn(3, 16), 1.5 * torch.randn(2, 16)
    wanted = distribution(target[0], cuts)
    found = first_token_law(target, None if looked_up else draft, 200_000, cuts)
    assert (found - wanted).abs().sum() / 2 < 0.01
    assert (found > 0).sum() <= (wanted > 0).sum()


def test_the_law_notices_a_draft_that_lies() -> None:
    """Drawn from other logits than are given: the test above must be able to fail."""
    torch.manual_seed(0)
    target, draft = 1.5 * torch.randn(3, 16), 1.5 * torch.randn(2, 16)
    drafted = torch.randint(16, (200_000, 2))
    kept, token = accept_drafts(
        target.expand(200_000, -1, -1), draft.expand(200_000, -1, -1), drafted, torch.rand(200_000, 3),
        backend="reference",
    )  # fmt: skip
    found = torch.bincount(torch.where(kept > 0, drafted[:, 0], token), minlength=16).double() / 200_000
    assert (found - distribution(target[0], {})).abs().sum() / 2 > 0.05


def test_the_second_token_follows_the_law_too() -> None:
    torch.manual_seed(1)
    samples = 200_000
    target, draft = torch.randn(3, 8), torch.randn(2, 8)
    drafted = torch.stack([draw_tokens(row.expand(samples, -1), torch.rand(samples)) for row in draft], 1)
    kept, token = accept_drafts(
        target.expand(samples, -1, -1), draft.expand(samples, -1, -1), drafted, torch.rand(samples, 3)
    )
    second = torch.where(kept > 1, drafted[:, 1], token)[kept > 0]
    found = torch.bincount(second, minlength=8).double() / len(second)
    assert (found - distribution(target[1], {})).abs().sum() / 2 < 0.01
    bonus = torch.bincount(token[kept == 2], minlength=8).double() / (kept == 2).sum()
    assert (bonus - distribution(target[2], {})).abs().sum() / 2 < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("looked_up", [False, True], ids=["drafted", "looked up"])
def test_greedy_keeps_the_likeliest_and_goes_on_with_it(backend: str, looked_up: bool) -> None:
    torch.manual_seed(0)
    rows, K, V = 24, 4, 37
    target = torch.randn(rows, K + 1, V)
    best = target.argmax(-1)
    drafted = best[:, :K].clone()
    wrong = torch.arange(rows) % (K + 1)  # the place of the first wrong token; K for none
    for row, place in enumerate(wrong.tolist()):
        if place < K:
            drafted[row, place] = (best[row, place] + 1 + row) % V
    draft = None
    if not looked_up:
        draft = torch.zeros(rows, K, V).scatter_(-1, drafted[..., None], 5.0).to(DEVICE)
    kept, token = accept_drafts(
        target.to(DEVICE), draft, drafted.to(DEVICE), torch.rand(rows, K + 1).to(DEVICE), temperature=0.0,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(kept.cpu(), wrong)
    assert torch.equal(token.cpu(), best.gather(1, wrong[:, None])[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_draft_as_many_as_they_like(backend: str, temperature: float) -> None:
    """Rounds without drafts, too; what a row did not draft is not looked at."""
    torch.manual_seed(0)
    K, V = 3, 21
    target = torch.randn(K + 1, V).expand(4, -1, -1).contiguous()
    drafted = target[:, :K].argmax(-1)
    counts = torch.tensor([0, 1, 2, 3])
    draft = torch.randn(4, K, V).scatter_(-1, drafted[..., None], 0.0)
    for row in range(4):
        draft[row, row:] = float("nan")
        drafted[row, row:] = 0
        draft[row, :row] = target[row, :row]  # the same distribution: everything is kept
    numbers = torch.full((4, K + 1), 0.5)
    kept, token = accept_drafts(
        target.to(DEVICE), draft.to(DEVICE), drafted.to(DEVICE), numbers.to(DEVICE), counts.to(DEVICE),
        temperature=temperature, backend=backend,
    )  # fmt: skip
    assert torch.equal(kept.cpu(), counts)
    for row in range(4):
        wanted = draw_tokens(target[row, row : row + 1], numbers[row, -1:], temperature=temperature)
        assert int(token[row]) == int(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_overlap_refuses_all_and_equality_keeps_all(backend: str) -> None:
    V = 10
    target = torch.full((2, 3, V), -torch.inf)
    target[..., :5] = 0.0
    draft = torch.full((2, 2, V), -torch.inf)
    draft[0, :, 5:] = 0.0
    draft[1, :, :5] = 0.0
    drafted = torch.tensor([[7, 8], [2, 3]])
    numbers = torch.tensor([[0.0, 0.0, 0.7], [1 - 2**-24, 1 - 2**-24, 0.7]])
    kept, token = accept_drafts(*(x.to(DEVICE) for x in (target, draft, drafted, numbers)), backend=backend)
    assert kept.tolist() == [0, 2]
    assert token.tolist() == [3, 3]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("dtype", "looked_up"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "looked up"],
)
@pytest.mark.parametrize("cuts", [*CUTS, {"temperature": 0.0}], ids=[*IDS, "greedy"])
def test_the_kernels_decide_as_the_reference(
    dtype: torch.dtype, cuts: dict[str, Any], looked_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that draw in different ways in one batch, several blocks of words, any strides."""
    torch.manual_seed(3)
    rows, K, V = (200, 3, 5000) if DEVICE == "cuda" else (5, 3, 300)  # the interpreter is slow
    if DEVICE == "cpu":
        monkeypatch.setattr("mambify.ops.draw.triton.CHUNK", 128)
    target = (2 * torch.randn(rows, V, K + 1)).to(dtype).mT.contiguous()
    draft = (target[:, :K].float() + 0.7 * torch.randn(rows, K, V)).to(dtype)
    settings = {name: torch.full((rows,), float(value)) for name, value in cuts.items()}
    if "temperature" in settings:
        settings["temperature"][::3] = 0.0
    drafted = torch.stack([draw_tokens(draft[:, k], torch.rand(rows), **settings) for k in range(K)], 1)
    counts = torch.randint(0, K + 1, (rows,))
    numbers = torch.rand(rows, K + 1)
    arguments = (target, None if looked_up else draft, drafted, numbers, counts)
    wanted = accept_drafts(*arguments, **settings, backend="reference")
    there = [None if x is None else x.to(DEVICE) for x in arguments]
    on_device = {name: value.to(DEVICE) for name, value in settings.items()}
    found = accept_drafts(*there, **on_device, backend="triton")
    same = (found[0].cpu() == wanted[0]) & (found[1].cpu() == wanted[1])
    assert same.float().mean() >= 0.98  # a uniform number may lie within rounding of a border


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("cuts", [{}, CUTS[-1], {"temperature": 0.0}], ids=["plain", "all", "greedy"])
def test_a_draft_of_some_words_in_parts_of_larger_buffers(
    cuts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer chunks than the target's; all that a row holds is put forward."""
    torch.manual_seed(4)
    rows, K, V, W = (200, 3, 9000, 5000) if DEVICE == "cuda" else (6, 3, 300, 110)
    monkeypatch.setattr("mambify.ops.draw.triton.CHUNK", 4096 if DEVICE == "cuda" else 64)
    known = torch.randperm(V)[:W].sort().values
    target = 2 * torch.randn(rows, K + 1, V)
    draft = target[:, :K, known] + 0.5 * torch.randn(rows, K, W)
    settings = {name: torch.full((rows,), float(value)) for name, value in cuts.items()}
    read, numbers = torch.zeros(rows, K + 4, dtype=torch.long), torch.rand(rows, 2 * K + 1)
    for k in range(K):
        draw_tokens(draft[:, k], torch.rand(rows), ids_V=known, out_S=read[:, k + 1], **settings)
    arguments = (target, draft, read, numbers, columns_of(known, V))

    def accepted(backend: str, *given: Tensor, **settings: Tensor) -> tuple[Tensor, Tensor]:
        target, draft, read, numbers, columns = given
        return accept_drafts(
            target, draft, read[:, 1 : K + 1], numbers[:, K:], draft_columns_V=columns, backend=backend, **settings
        )

    wanted = accepted("reference", *arguments, **settings)
    on_device = {name: value.to(DEVICE) for name, value in settings.items()}
    found = accepted("triton", *(x.to(DEVICE) for x in arguments), **on_device)
    assert 0 < wanted[0].float().mean() < K
    same = (found[0].cpu() == wanted[0]) & (found[1].cpu() == wanted[1])
    assert same.float().mean() >= 0.98


def test_what_does_not_fit_is_refused() -> None:
    target, drafted, numbers = torch.randn(2, 3, 5), torch.zeros(2, 2, dtype=torch.long), torch.rand(2, 3)
    with pytest.raises(ValueError, match="drafted_SK"):
        accept_drafts(target, None, drafted[:, :1], numbers)
    with pytest.raises(ValueError, match="draft_SKW"):
        accept_drafts(target, target, drafted, numbers)
    with pytest.raises(ValueError, match="top_p"):
        accept_drafts(target, None, drafted, numbers, top_p=torch.ones(3))
    with pytest.raises(InvalidOptionError, match="triton"):
        accept_drafts(target.double(), None, drafted, numbers, backend="triton")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which is what the interpreter computes with
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [300, 20_000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafted", [0, 2])
def test_rows_that_are_no_numbers_give_a_token_all_the_same(
    backend: str, V: int, temperature: float, drafted: int
) -> None:
    """One beyond the vocabulary would be read from beyond the embedding."""
    target = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    target[0], target[1, :, 7] = float("nan"), float("inf")
    given = target, None, torch.tensor([[1, 2], [3, 4]]), torch.full((2, 3), 0.5), torch.tensor([drafted, drafted])
    kept, token = accept_drafts(
        *(None if x is None else x.to(DEVICE) for x in given), temperature=temperature, backend=backend
    )
    assert all(0 <= count <= drafted for count in kept.tolist())
    assert all(0 <= found < V for found in token.tolist())
