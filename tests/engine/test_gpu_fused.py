"""The fused step on a GPU, in bfloat16 and recorded: its kernels by themselves, and a whole model's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.bench.shapes import model_of_shape
from mambify.conversion.cut import cut
from mambify.distill.run import in_dtype
from mambify.engine import Sampling, Speculator
from mambify.engine.pace import Pace
from mambify.engine.tower import Tower
from mambify.model import HybridForCausalLM
from mambify.ops.conv_replay import conv_replay
from mambify.ops.decode_linear import Convolution, decode_linear
from mambify.ops.ring import RingPlace
from replaying import advance

pytestmark = pytest.mark.gpu
MIXES = {
    "attention": ("attention",) * 4, "mamba2": ("mamba2",) * 4, "halves": ("mamba2", "attention") * 2,
    "mamba1": ("mamba1", "attention") * 2,
}  # fmt: skip
PURE = ["mamba-tiny", "mamba2-tiny"]


def model_of(mix: str, tiny_hybrid: Callable[..., HybridForCausalLM], **changes: Any) -> HybridForCausalLM:
    """A tiny hybrid, or a pure Mamba model."""
    return model_of_shape(mix, "cpu", torch.float32, seed=0) if mix in PURE else tiny_hybrid(MIXES[mix], **changes)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("inputs", "heights", "gated"),
    [(4096, [4096, 1024, 1024], False), (4096, [1536, 1536], True), (14_336, [512], False), (576, [1545], False)],
)
def test_a_row_is_the_same_in_any_company(
    inputs: int, heights: list[int], gated: bool, normed: bool, overlap: bool
) -> None:
    """To the last bit among those that one kernel multiplies."""
    from mambify.ops.decode_linear.triton import way_of

    torch.manual_seed(0)
    x = torch.randn(16, inputs, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(height, inputs, device="cuda", dtype=torch.bfloat16) / 64 for height in heights]
    settings: dict[str, Any] = {"gated": gated, "overlap": overlap, "backend": "triton"}
    if normed:
        settings |= {"norm_D": torch.rand(inputs, device="cuda", dtype=torch.bfloat16), "eps": 1e-5}
    wanted = decode_linear(x, weights, **settings | {"backend": "reference", "overlap": False})
    by_row = torch.cat([decode_linear(x[row : row + 1], weights, **settings) for row in range(8)])
    by_tile = decode_linear(x, weights, **settings)
    for rows in (1, 2, 3, 4, 5, 8, 9):
        together = decode_linear(x[:rows], weights, **settings)
        assert torch.equal(together, (by_tile if way_of(rows, weights, gated=gated) == "tiles" else by_row)[:rows])
        assert (together - wanted[:rows]).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("slots", "new"), [(1, 1), (1, 5), (4, 2), (8, 1)])
@pytest.mark.parametrize(("inputs", "outputs", "first", "channels"), [(2560, 1024, 0, 512), (576, 300, 70, 201)])
def test_a_convolution_within_a_product(
    inputs: int, outputs: int, first: int, channels: int, slots: int, new: int, overlap: bool
) -> None:
    """The product and then the convolution, from a stream in float32; their inputs are kept to the last bit."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, device="cuda").bfloat16() / 64
    taps, bias = torch.randn(channels, 4, device="cuda").bfloat16(), torch.randn(channels, device="cuda").bfloat16()
    place = RingPlace.empty(slots, new, device="cuda")
    place.active_S.copy_(torch.arange(slots) != 1)
    ring = torch.randn(slots, place.capacity, channels, device="cuda").bfloat16()
    rings = ring, ring.clone()
    settings: dict[str, Any] = {"norm_D": torch.rand(inputs, device="cuda").bfloat16(), "eps": 1e-5}
    for _ in range(3):
        x = torch.randn(slots * new, inputs, device="cuda")
        convolution = Convolution(first, taps, bias, rings[0], place)
        found = decode_linear(x, [weight], convolution=convolution, overlap=overlap, backend="triton", **settings)
        wanted = decode_linear(x, [weight], backend="triton", **settings)
        part = wanted[:, first : first + channels]
        part.copy_(conv_replay(part.unflatten(0, (slots, new)), taps, bias, rings[1], place).flatten(0, 1))
        advance(place, torch.full((slots,), new, device="cuda"), new)
        assert torch.equal(rings[0], rings[1])
        assert (found.float() - wanted.float()).abs().max() <= 0.01 * wanted.float().abs().max()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mix", [*MIXES, *PURE])
@pytest.mark.parametrize(("slots", "read"), [(1, 1), (3, 1), (1, 5), (2, 4), (12, 1), (8, 3)])
def test_logits_of_the_modules(
    tiny_hybrid: Callable[..., HybridForCausalLM], mix: str, slots: int, read: int, overlap: bool
) -> None:
    """As near to what float32 says, over many turns: a single one may be far off by either way."""
    model = model_of(mix, tiny_hybrid, qk_norm=True, attention_bias=True).to("cuda")
    truth: list[Tensor] = []
    errors: dict[str, float] = {}
    for backend, dtype in (("modules", torch.float32), ("modules", torch.bfloat16), ("fused", torch.bfloat16)):
        active_S = torch.ones(slots, dtype=torch.bool, device="cuda")
        with torch.inference_mode():
            tower = Tower(
                in_dtype(model, dtype, "cuda"), num_slots=slots, length=200, most_new=read, active_S=active_S,
                final=read == 1, backend=backend, overlap=overlap and backend == "fused",
            )  # fmt: skip
            tower.begin(range(slots), [list(range(3, 8 + slot)) for slot in range(slots)])
            found = []
            for turn in range(40):
                token_ST = torch.randint(3, 90, (slots, read), generator=torch.Generator().manual_seed(turn)).cuda()
                logits_STV = tower.read(token_ST)
                found.append(logits_STV.float().clone())
                tower.keep(torch.full((slots,), read // 2 + 1, device="cuda"), read)
        if dtype == torch.float32:
            truth = found
        else:
            far = [(got - true).abs().max() / true.abs().max() for got, true in zip(found, truth, strict=True)]
            errors[backend] = float(torch.stack(far).mean())
    assert errors["fused"] < 1.25 * errors["modules"] < 0.1


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mix", [*MIXES, *PURE])
@pytest.mark.parametrize("draft", [None, "lookup"])
def test_recorded_rounds_in_float32_give_the_models_tokens(
    tiny_hybrid: Callable[..., HybridForCausalLM], mix: str, draft: Any, overlap: bool
) -> None:
    model = model_of(mix, tiny_hybrid).to("cuda")
    runs = []
    for backend in ("modules", "fused"):
        speculator = Speculator(
            model, draft, num_slots=2, max_length=96, sampling=Sampling(temperature=0.0), backend=backend,
            overlap=overlap and backend == "fused",
        )  # fmt: skip
        answers: list[list[int]] = [[], [], []]
        for number, tokens in speculator.run([[5, 6, 7], [9], [20, 21, 20, 21]], max_new_tokens=60):
            answers[number] += tokens
        runs.append(answers)
    assert runs[0] == runs[1]


class InTurn(Pace):
    """Takes every K in turn, whatever is accepted."""

    def choose(self) -> int:
        self._turn = getattr(self, "_turn", -1) + 1
        return sorted(self._seconds)[self._turn * 3 % len(self._seconds)]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("words", [96, 24])
def test_recorded_rounds_of_every_k_share_their_memory(
    tiny_hybrid: Callable[..., HybridForCausalLM], words: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed in turn over one pool, with a draft that knows some words or all: the tokens of plain decoding."""
    monkeypatch.setattr("mambify.engine.speculate.Pace", InTurn)
    model = tiny_hybrid(MIXES["halves"]).to("cuda")
    size = model.config.vocab_size
    draft = cut(model, 4, token_ids=None if words == 96 else torch.arange(0, size, size // words, device="cuda"))
    settings: dict[str, Any] = {
        "num_slots": 2, "max_length": 96, "sampling": Sampling(temperature=0.0, repetition_penalty=penalty)
    }  # fmt: skip
    runs = []
    for speculator in (
        Speculator(model, None, **settings),
        Speculator(model, draft, num_draft_tokens=(1, 4), **settings),
    ):
        answers: list[list[int]] = [[], [], []]
        for number, tokens in speculator.run([[5, 6, 7], [9], [20, 21, 20, 21]], max_new_tokens=60):
            answers[number] += tokens
        runs.append(answers)
    assert runs[0] == runs[1]
    assert len(speculator.statistics.drafted) == 4
