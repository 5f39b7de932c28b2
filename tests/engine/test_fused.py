"""The fused step gives what the model's own modules give: logits, tokens, and everything that is carried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mambify.bench.shapes import model_of_shape
from mambify.conversion import apply_plan, plan
from mambify.conversion.cut import cut
from mambify.engine import Sampling, Speculator
from mambify.engine.fused import can_overlap
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.families.load import load
from mambify.mixers import ReplayState
from mambify.model import HybridForCausalLM
from mambify.ops.backends import HAS_TRITON

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel

MIXED = ("mamba2", "attention", "mamba1", "attention")
MIXES = {
    "mamba2": ("mamba2",) * 3, "mamba1": ("mamba1",) * 2, "attention": ("attention",) * 3, "mixed": MIXED,
    "halves": ("mamba2", "attention", "mamba2", "attention"),
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "normed heads": {"qk_norm": True},
    "sliding": {"sliding_window": 5},
    "odd": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 91},
    "gelu": {"hidden_act": "gelu"},
    "scaled rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


def tower(model: HybridForCausalLM, backend: str, *, slots: int = 3, most_new: int = 4, final: bool = False) -> Tower:
    active_S = torch.ones(slots, dtype=torch.bool)
    return Tower(
        model, num_slots=slots, length=48, most_new=most_new, active_S=active_S, final=final, backend=backend
    )  # fmt: skip


def found(towers: Sequence[Tower], rounds: Sequence[tuple[int, list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """Logits of both towers in every round of (tokens read, how many of them stand in each slot)."""
    slots = towers[0].num_slots
    with torch.inference_mode():
        for each in towers:
            each.begin(range(slots), ([5, 6, 7, 8, 9, 10, 11], [4], [])[:slots])
        generator, pairs = torch.Generator().manual_seed(0), []
        for read, stand in rounds:
            token_ST = torch.randint(3, 90, (slots, read), generator=generator)
            logits = [each.read(token_ST) for each in towers]
            for each in towers:
                each.keep(torch.tensor(stand[:slots]), read)
            assert logits[0] is not None and logits[1] is not None
            pairs.append((logits[0], logits[1]))
    return pairs


def check(model: HybridForCausalLM, rounds: Sequence[tuple[int, list[int]]], **settings: Any) -> None:
    towers = [tower(model, backend, **settings) for backend in ("modules", "fused")]
    for ours, wanted in found(towers[::-1], rounds):
        assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max().clamp(min=1.0)


ROUNDS = [(4, [4, 0, 2]), (1, [1, 1, 1]), (3, [0, 3, 1]), *[(4, [4, 3, 4])] * 4, (2, [2, 1, 0])]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("changes", CHANGES)
def test_rounds_of_any_length(tiny_hybrid: Callable[..., HybridForCausalLM], mix: str, changes: str) -> None:
    """Some tokens stand and some do not, often enough that states are folded."""
    check(tiny_hybrid(MIXES[mix], **CHANGES[changes]), ROUNDS)


#: pure Mamba models, and the way in which each is special
PURE: dict[str, dict[str, Any]] = {
    "mamba-tiny": {},
    "mamba-tiny biased": {"ssm_proj_bias": True, "ssm_conv_bias": False, "residual_in_fp32": False, "conv_kernel": 3},
    "mamba2-tiny": {},
    "mamba2-tiny biased": {"ssm_proj_bias": True, "ssm_conv_bias": False, "ssm_num_groups": 1},
    "mamba2-tiny limited": {"ssm_dt_min": 0.01, "ssm_dt_max": 0.05},
}


def pure(name: str, **changes: Any) -> HybridForCausalLM:
    """With other biases than the zeros that PyTorch begins with."""
    model = model_of_shape(name.split()[0], "cpu", torch.float32, seed=1, **PURE[name] | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("slots", [3, 1])  # three times four rows are more than one kernel takes
def test_rounds_of_pure_mamba(name: str, slots: int) -> None:
    check(pure(name), ROUNDS, slots=slots)


@pytest.mark.parametrize("mix", ["mamba2", "halves", "mixed", "mamba-tiny", "mamba2-tiny"])
def test_one_token_at_a_time_that_stands(tiny_hybrid: Callable[..., HybridForCausalLM], mix: str) -> None:
    """Where all layers allow it, states go on with every token and nothing is ever pending.

    With weights packed for a CPU tokens wait in rings all the same: a state is then written every thirty tokens.
    """
    make = partial(pure, mix) if mix in PURE else partial(tiny_hybrid, MIXES[mix])
    check(make(), [(1, [1, 1, 1])] * 40, most_new=1, final=True)
    model = make(ops_backend="reference")
    check(model, [(1, [1, 1, 1])] * 30, most_new=1, final=True)
    one = tower(model, "fused", most_new=1, final=True)
    found([one, one], [(1, [1, 1, 1])])
    assert bool(one.place.pending_S.any()) == (mix == "mamba2-tiny")


def test_a_head_that_knows_some_words(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    """Logits of these alone, from a product with their rows."""
    whole = tiny_hybrid(MIXES["halves"])
    few = cut(whole, 4, token_ids=torch.arange(2, whole.config.vocab_size, 5))
    check(few, ROUNDS)
    pairs = [found([tower(model, "fused")] * 2, ROUNDS[:1])[0][0] for model in (few, whole)]
    assert torch.allclose(pairs[0], pairs[1][..., few.lm_head.token_ids], atol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("mix", ["halves", "mixed", "mamba-tiny", "mamba2-tiny"])
@pytest.mark.parametrize("final", [False, True])
def test_kernels(
    tiny_hybrid: Callable[..., HybridForCausalLM], mix: str, final: bool, products_by_kernels: Callable[[], None]
) -> None:
    """The same with every operation's kernel, in Triton's interpreter."""
    products_by_kernels()
    if mix in PURE:
        model = pure(mix, ops_backend="triton")
        model.model.layers = model.model.layers[:1]
    else:
        model = tiny_hybrid(MIXES[mix], ops_backend="triton", attention_bias=True, qk_norm=True)
    reads = [(1, [1, 1, 1])] * 2 if final else [(2, [2, 0, 1]), (1, [1, 1, 1])]
    check(model, reads, most_new=1 if final else 2, final=final)


def test_an_inactive_slot_stays_as_it_is(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    for final in (False, True):
        one = tower(tiny_hybrid(MIXES["halves"]), "fused", most_new=1, final=final)
        found([one, one], [(1, [1, 1, 1])] * 2)
        one.place.active_S[1] = False
        states = [state for state in one.states if isinstance(state, ReplayState)]
        before = [(state.ssm[1].clone(), state.conv[1].clone()) for state in states]
        found_before = one.length_S.clone()
        with torch.inference_mode():
            one.read(torch.tensor([[3], [4], [5]]))
            one.keep(torch.ones(3, dtype=torch.long), 1)
        assert one.length_S.tolist() == (found_before + torch.tensor([1, 0, 1])).tolist()
        for state, (ssm, conv) in zip(states, before, strict=True):
            assert torch.equal(state.ssm[1], ssm) and torch.equal(state.conv[1], conv)


def test_parameters_stay_where_they_are(tiny_hybrid: Callable[..., HybridForCausalLM], tmp_path: Any) -> None:
    """No second copy: the same storages and names before and after, and the model saves, loads and trains."""
    model = tiny_hybrid(MIXED)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    one = tower(model, "fused")
    found([one, one], ROUNDS[:2])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(load(tmp_path).model(ids).logits, model(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_projection_with_an_adapter_runs_as_it_is(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    class Adapted(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * x.flip(-1)

    model = tiny_hybrid(MIXES["halves"])
    for place, name in ((0, "out_proj"), (1, "o_proj")):
        mixer = model.model.layers[place].mixer
        adapted = Adapted(64, 64, bias=False)
        adapted.load_state_dict(getattr(mixer, name).state_dict())
        setattr(mixer, name, adapted)
    check(model, ROUNDS)
    check(model, [(1, [1, 1, 1])] * 4, most_new=1, final=True)


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_tokens_of_the_real_teacher_half_converted(smollm2: LoadedModel, draft: Any) -> None:
    student = apply_plan(smollm2.model, plan(smollm2.model.config, mixer="mamba2", attention=0.5)).eval()
    prompts = [[1, 4093, 198, 2683, 359], [504, 3575, 282, 4649, 314]]
    runs = []
    for backend in ("modules", "fused"):
        speculator = Speculator(
            student, draft, num_slots=2, max_length=32, sampling=Sampling(temperature=0.0), backend=backend
        )
        answers: list[list[int]] = [[], []]
        for number, tokens in speculator.run(prompts, max_new_tokens=10):
            answers[number] += tokens
        runs.append(answers)
    assert runs[0] == runs[1]


def test_what_cannot_be_is_refused(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    with pytest.raises(InvalidOptionError, match="did you mean 'fused'"):
        tower(tiny_hybrid(MIXED), "fussed")
    moving = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InvalidOptionError, match="modules"):
        tower(tiny_hybrid(MIXED, rope_parameters=moving), "fused")


@pytest.mark.parametrize(
    ("capability", "toolkit", "can"), [((9, 0), "13.0", True), ((8, 9), "13.0", False), ((9, 4), None, False)]
)
def test_kernels_overlap_where_the_device_can(
    capability: tuple[int, int], toolkit: str | None, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    assert can_overlap(torch.device("cuda")) == can
    assert not can_overlap(torch.device("cpu"))
