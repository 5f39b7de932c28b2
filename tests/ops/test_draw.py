from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.draw import draw_tokens, uniform, uniforms

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUTS = [(0, 1.0), (5, 1.0), (0, 0.7), (50, 0.9), (1, 1.0), (0, 1e-6)]


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The probabilities transformers draws from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits.double()).softmax(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_uniform_numbers_are_sent_to_the_quantiles(backend: str, dtype: torch.dtype, top_k: int, top_p: float) -> None:
    row = torch.randperm(777).div(100).to(dtype)  # bfloat16: many equal ones
    rows = 64 if backend == "reference" or DEVICE == "cuda" else 6  # the interpreter is slow
    numbers = torch.linspace(0, 1, rows + 1)[:-1] + 1e-3
    drawn = draw_tokens(
        row.expand(rows, -1).contiguous().to(DEVICE), numbers.to(DEVICE), temperature=0.8, top_k=top_k, top_p=top_p,
        backend=backend,
    ).cpu()  # fmt: skip
    probability = warped(row[None], 0.8, top_k, top_p)[0]
    if dtype == torch.bfloat16:  # tokens as likely as the last one kept are kept: of equals, warpers keep some
        probability = draw_tokens_probability(row, 0.8, top_k, top_p)
    upto = probability.cumsum(0)
    for number, token in zip(numbers.tolist(), drawn.tolist(), strict=True):
        assert probability[token] > 0
        assert upto[token] - probability[token] - 1e-4 < number < upto[token] + 1e-4


def draw_tokens_probability(row: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """By sorting, with all equals of the last token kept."""
    exact = row.double()
    if top_k:
        exact = exact.masked_fill(exact < exact.sort(descending=True).values[top_k - 1], -torch.inf)
    probability = (exact / temperature).softmax(-1)
    if top_p < 1.0:
        ordered = probability.sort(descending=True).values
        needed = int((ordered.cumsum(0) < top_p).sum())
        probability = probability.masked_fill(probability < ordered[needed], 0.0)
    return probability / probability.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_probability_is_never_drawn(backend: str) -> None:
    logits = torch.full((6, 30), -torch.inf)
    logits[:, 7], logits[:, 20] = -1e30, 0.0
    numbers = torch.tensor([0.0, 0.5, 1 - 2**-24] * 2)
    drawn = draw_tokens(logits.to(DEVICE), numbers.to(DEVICE), top_k=3, backend=backend)
    assert drawn.tolist() == [20] * 6


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(5, 33)
    assert torch.equal(draw_tokens(logits, torch.rand(5), temperature=0.0), logits.argmax(-1))


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_counter() -> None:
    seeds, counters = torch.arange(400)[:, None], torch.arange(1000)
    numbers = uniform(seeds, counters)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.bincount((numbers.flatten() * 100).long(), minlength=100).double()
    assert 60 < ((counts - 4000) ** 2 / 4000).sum() < 150  # chi-square with 99 degrees of freedom
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), numbers.roll((1, -1), (0, 1))):
        assert torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1].abs() < 0.01
    assert torch.equal(uniform(torch.tensor([7]), torch.tensor([9])), numbers[7:8, 9])


def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="triton"):
        draw_tokens(torch.randn(2, 5).double(), torch.rand(2), backend="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_uniform_numbers_are_the_same_by_every_backend() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = torch.tensor([0, 1, 2**40, -7, 2**63 - 1], device=device)
    counter = torch.arange(-3, 300, device=device)
    for pair in ((seed[:, None], counter), (seed, counter[:5]), (seed[:, None], counter[:5, None] * 64)):
        wanted, found = (uniform(*pair, backend=backend) for backend in ("reference", "triton"))
        assert torch.equal(found, wanted) and found.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_a_place_are_those_of_its_counters(backend: str) -> None:
    seed, place = torch.tensor([3, -2, 2**40], device=DEVICE), torch.tensor([0, 5, 99], device=DEVICE)
    wanted = uniform(seed[:, None], place[:, None] * 64 + torch.arange(7, device=DEVICE), backend="reference")
    assert torch.equal(uniforms(seed, place, 7, apart=64, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [97, 300], ids=["one program a row", "chunks"])
def test_rows_of_every_kind_and_where_tokens_are_put(
    backend: str, dtype: torch.dtype, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, plain and cut rows in one batch; names of the words, strided numbers and places, and a copy."""
    monkeypatch.setattr("mambify.ops.draw.triton.CHUNK", 64)
    generator = torch.Generator().manual_seed(words)
    rows, ids = 12, torch.randperm(1000, generator=generator)[:words]
    logits = (3 * torch.randn(rows, words, generator=generator)).to(dtype)
    logits[:, 64:128] = -torch.inf  # of a whole chunk, nothing
    numbers = torch.rand(rows, 3, generator=generator)
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3] * 3), "top_k": torch.tensor([0, 0, 0, 9, 0, 20] * 2),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.8] * 2 + [1.0] * 2),
        "min_p": torch.tensor([0.0] * 9 + [0.2] * 3),
    }  # fmt: skip
    plain = draw_tokens(logits, numbers[:, 1].contiguous(), **settings, backend="reference")
    there = {name: value.to(DEVICE) for name, value in settings.items()}
    out, copied = torch.zeros(rows, 4, dtype=torch.long, device=DEVICE), torch.zeros(rows, 2, words, dtype=dtype)
    copied = copied.to(DEVICE)
    drawn = draw_tokens(
        logits.to(DEVICE), numbers.to(DEVICE)[:, 1], **there, ids_V=ids.to(DEVICE), out_S=out[:, 2],
        copy_SV=copied[:, 1], backend=backend,
    )  # fmt: skip
    assert torch.equal(drawn.cpu(), ids[plain]) and torch.equal(out[:, 2], drawn)
    assert (out[:, [0, 1, 3]] == 0).all() and (copied[:, 0] == 0).all()
    assert torch.equal(copied[:, 1].cpu(), logits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which is what the interpreter computes with
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [300, 20_000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_numbers_give_a_token_all_the_same(backend: str, V: int, temperature: float) -> None:
    """One beyond the vocabulary would be read from beyond the embedding."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1, 7] = float("nan"), float("inf")
    drawn = draw_tokens(
        logits.to(DEVICE), torch.full((3,), 0.5, device=DEVICE), temperature=temperature, backend=backend
    )
    assert all(0 <= token < V for token in drawn.tolist())
