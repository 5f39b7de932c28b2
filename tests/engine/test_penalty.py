"""The repetition penalty: transformers' definition, with drafts as without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import mambify
from mambify.conversion.cut import cut
from mambify.engine import DecodeEngine, Sampling, Speculator
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.model import HybridForCausalLM
from mambify.ops.draw import penalise, settings_of
from mambify.ops.draw.reference import weights

Hybrid = Callable[..., HybridForCausalLM]
LAYERS = ["mamba2", "attention", "mamba1", "attention"]


def test_it_is_transformers_penalty_at_every_position() -> None:
    """Drafted tokens, some of them twice or in the prompt, count from the position after them on."""
    generator = torch.Generator().manual_seed(0)
    logits_STV = torch.randn(5, 4, 12, generator=generator)
    prompts = torch.randint(12, (5, 6), generator=generator)
    drafted = torch.tensor([[1, 1, 2], [3, 4, 3], [0, 0, 0], [5, 6, 7], [11, 2, 11]])
    seen_SV = torch.zeros(5, 12, dtype=torch.bool).scatter_(1, prompts, True)
    for penalty in (1.3, 0.7):
        found = penalise(logits_STV, seen_SV, drafted, penalty=penalty)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)
        for t in range(4):
            wanted = theirs(torch.cat([prompts, drafted[:, :t]], 1), logits_STV[:, t].clone())
            assert torch.equal(found[:, t], wanted)
    rows = penalise(logits_STV, seen_SV, drafted, penalty=torch.tensor([1.0, 1.3, 1.0, 0.7, 2.0]))
    assert torch.equal(rows[0], logits_STV[0])
    assert torch.equal(rows[1], penalise(logits_STV, seen_SV, drafted, penalty=1.3)[1])
    assert not seen_SV.all()


@pytest.mark.parametrize("draft", ["none", "lookup", "small", "itself"])
@pytest.mark.parametrize("penalty", [1.2, 2.0])
def test_greedy_tokens_are_transformers(tiny_hybrid: Hybrid, draft: str, penalty: float) -> None:
    target = tiny_hybrid(LAYERS)
    drafts: dict[str, Any] = {
        "none": None, "lookup": "lookup", "itself": target, "small": tiny_hybrid(["attention", "mamba2"], seed=1)
    }  # fmt: skip
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 3, 4, 5], [90, 3, 90, 3, 90]]
    found = mambify.generate(
        target, prompts, draft=drafts[draft], num_draft_tokens=3, max_new_tokens=30,
        repetition_penalty=penalty, eos_token_id=[],
    )  # fmt: skip
    free = mambify.generate(target, prompts, max_new_tokens=30, eos_token_id=[])
    for prompt, row in zip(prompts, found, strict=True):
        theirs = target.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=penalty,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert row == theirs[0].tolist()
    assert found != free


def test_what_it_puts_forward_is_penalised_as_well(tiny_hybrid: Hybrid) -> None:
    """A target that drafts for itself keeps everything, which it would not from a distribution of its own."""
    target = tiny_hybrid(LAYERS)
    sampling = Sampling(1.0, repetition_penalty=1.8)
    decoder = Speculator(target, target, num_slots=1, max_length=64, sampling=sampling, num_draft_tokens=3)
    list(decoder.run([[5, 6, 7]], max_new_tokens=32, seeds=[1]))
    assert decoder.statistics.accepted == [0, 0, 0, 8]


@pytest.mark.parametrize("draft", ["small", "few words", "lookup", "itself"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(repetition_penalty=2.5), Sampling(0.8, top_k=5, top_p=0.95, min_p=0.02, repetition_penalty=1.7)],
)
def test_drawn_tokens_follow_the_penalised_target(tiny_hybrid: Hybrid, sampling: Sampling, draft: str) -> None:
    """Triples of tokens, drafted in one round, against the product of the target's penalised distributions."""
    V = 6
    facts: dict[str, Any] = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
    target = tiny_hybrid(["mamba2", "attention"], seed=1, **facts)
    drafts: dict[str, Any] = {
        "itself": target, "lookup": "lookup",
        "small": tiny_hybrid(["attention"], seed=4, **facts),
        "few words": cut(target, 2, token_ids=torch.tensor([0, 1, 3, 4])),
    }  # fmt: skip
    samples, prompt = 6_000, [3, 1, 3, 1]
    decoder = Speculator(target, drafts[draft], num_slots=2000, max_length=12, sampling=sampling, num_draft_tokens=2)
    answers: list[list[int]] = [[] for _ in range(samples)]
    for number, tokens in decoder.run([prompt] * samples, max_new_tokens=3, seeds=list(range(samples))):
        answers[number] += tokens
    found = torch.tensor(answers)
    counts = torch.bincount(found[:, 0] * V * V + found[:, 1] * V + found[:, 2], minlength=V**3).double() / samples
    theirs = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)

    @torch.no_grad()
    def law(counted: int) -> torch.Tensor:
        """Of all triples, where tokens after the first ``counted`` are not penalised."""

        def distribution(ids: list[int]) -> torch.Tensor:
            logits = target(input_ids=torch.tensor([ids])).logits[:, -1]
            logits = theirs(torch.tensor([ids[:counted]]), logits)
            weight = weights(logits, settings_of(**sampling.settings(), rows=1, device=logits.device))[0]
            return weight / weight.sum()

        first = distribution(prompt)
        pairs = [(a, b) for a in range(V) for b in range(V)]
        return torch.stack(
            [first[a] * distribution([*prompt, a])[b] * distribution([*prompt, a, b]) for a, b in pairs]
        ).flatten()

    wanted = law(counted=100)
    assert (law(counted=len(prompt)) - wanted).abs().sum() / 2 > 0.15  # what drafted tokens do is seen
    assert (counts - wanted).abs().sum() / 2 < 0.05  # 6,000 draws stray by about 0.025
    assert ((counts > 0) <= (wanted > 0)).all()


def test_a_slot_forgets_what_occurred_in_it_before(tiny_hybrid: Hybrid) -> None:
    target = tiny_hybrid(LAYERS)
    sampling = Sampling(0.0, repetition_penalty=1.5)
    decoder = Speculator(target, "lookup", num_slots=1, max_length=64, sampling=sampling)
    alone = [token for _, piece in decoder.run([[9, 8]], max_new_tokens=20) for token in piece]
    both: list[list[int]] = [[], []]
    for number, piece in decoder.run([[5, 6, 7], [9, 8]], max_new_tokens=20):
        both[number] += piece
    assert both[1] == alone


def test_nothing_is_kept_without_a_penalty(tiny_hybrid: Hybrid) -> None:
    decoder = Speculator(tiny_hybrid(LAYERS), None, num_slots=1, max_length=16, sampling=Sampling())
    assert decoder._seen_SV is None


def test_slots_of_synthesis_refuse_it(tiny_hybrid: Hybrid) -> None:
    with pytest.raises(InvalidOptionError, match="without repetition_penalty"):
        DecodeEngine(
            tiny_hybrid(LAYERS), num_slots=1, max_length=16, sampling=Sampling(repetition_penalty=1.1), stop_ids=[]
        )


def test_the_real_teacher(smollm2: LoadedModel) -> None:
    ids = torch.tensor([require_tokenizer(smollm2).encode("The sky is blue, the sky is blue, the sky is")])
    settings: dict[str, Any] = {"max_new_tokens": 10, "repetition_penalty": 1.3, "eos_token_id": []}
    found = mambify.generate(smollm2.model, ids, draft="lookup", **settings)
    theirs = smollm2.model.generate(
        ids, max_new_tokens=10, repetition_penalty=1.3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found, theirs)
    assert not torch.equal(found, mambify.generate(smollm2.model, ids, max_new_tokens=10, eos_token_id=[]))
