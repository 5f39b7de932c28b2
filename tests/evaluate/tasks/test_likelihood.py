"""Log likelihoods in batches are those of one example at a time, read whole; shared contexts are read once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedModel

from mambify import HybridForCausalLM
from mambify.errors import InvalidOptionError, UsageError
from mambify.evaluate.tasks.batching import batches, halving
from mambify.evaluate.tasks.likelihood import Continuation, LikelihoodScorer
from tiny import llama

VOCABULARY = 96
MIXERS = {
    "hybrid": ("mamba2", "attention", "mamba1", "attention"),
    "attention": ("attention",) * 3,
    "recurrent": ("mamba2", "mamba1"),
}


def questions(*, seed: int = 0, num: int = 7) -> list[Continuation]:
    """Contexts of 1 to 20 tokens with 1 to 4 continuations of 1 to 9 tokens each, shuffled."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high)))

    rows = [
        Continuation(context, ids(1, 9))
        for context in [ids(1, 20) for _ in range(num)]
        for _ in range(draw.randint(1, 4))
    ]
    draw.shuffle(rows)
    return rows


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, rows: Sequence[Continuation]) -> list[tuple[float, bool]]:
    results = []
    for context, ids in rows:
        logits_TV = model(input_ids=torch.tensor([[*context, *ids]]), use_cache=False).logits[0]
        logp_CV = logits_TV[len(context) - 1 : -1].double().log_softmax(-1)
        next_C = torch.tensor(ids)
        value = float(logp_CV[torch.arange(len(ids)), next_C].sum())
        results.append((value, bool((logp_CV.argmax(-1) == next_C).all())))
    return results


def assert_equal(model: PreTrainedModel, scorer: LikelihoodScorer, rows: Sequence[Continuation]) -> None:
    scored = scorer(rows)
    expected = one_by_one(model, rows)
    assert [row.log_likelihood for row in scored] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [row.is_greedy for row in scored] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", MIXERS)
def test_hybrids(tiny_hybrid: Callable[..., HybridForCausalLM], kind: str, batch_size: int | None) -> None:
    model = tiny_hybrid(MIXERS[kind])
    scorer = LikelihoodScorer(model, max_length=128, batch_size=batch_size)
    assert scorer.continues_from_cache
    assert_equal(model, scorer, questions())


def test_a_model_of_transformers() -> None:
    model = llama(VOCABULARY)
    scorer = LikelihoodScorer(model, max_length=128)
    assert scorer.continues_from_cache
    assert_equal(model, scorer, questions(seed=1))


def test_greedy_continuations_are_known(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    model = tiny_hybrid()
    prompt = torch.tensor([[5, 6, 7, 8]])
    ids = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    rows = [Continuation((5, 6, 7, 8), tuple(ids[:n])) for n in (1, 5)]
    rows.append(Continuation((5, 6, 7, 8), (*ids[:4], (ids[4] + 1) % VOCABULARY)))
    assert [row.is_greedy for row in LikelihoodScorer(model, max_length=128)(rows)] == [True, True, False]


def granite() -> PreTrainedModel:
    """A stock hybrid of transformers'."""
    config = GraniteMoeHybridConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        shared_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=0,
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_d_head=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return GraniteMoeHybridForCausalLM(config).eval()


def test_models_that_cannot_continue_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = granite()
    scorer = LikelihoodScorer(model, max_length=128)
    assert_equal(model, scorer, questions(seed=2))
    forward = model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    forgetful.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", forgetful)
    scorer = LikelihoodScorer(model, max_length=128)
    assert not scorer.continues_from_cache
    assert_equal(model, scorer, questions(seed=2))


def test_a_shared_context_is_read_once(
    tiny_hybrid: Callable[..., HybridForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hybrid()
    scorer = LikelihoodScorer(model, max_length=128)
    read: list[int] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: read.append(kwargs["input_ids"].numel()) or forward(*args, **kwargs)
    )
    context = tuple(range(30))
    scorer([Continuation(context, (40 + i, 50 + i)) for i in range(4)])
    assert read == [30, 4]
    read.clear()
    scorer([Continuation(context, (letter,)) for letter in (40, 41, 42, 43, 44)])  # one token each: one pass
    assert read == [30]


def test_what_is_too_long_loses_its_beginning(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    model = tiny_hybrid()
    scorer = LikelihoodScorer(model, max_length=10)
    context, short, long = tuple(range(1, 21)), (30, 31), (30, 31, 32, 33)
    scored = scorer([Continuation(context, short), Continuation(context, long)])
    # ten tokens are read: the last one of a continuation is only predicted
    expected = one_by_one(model, [Continuation(context[-9:], short), Continuation(context[-7:], long)])
    assert [row.log_likelihood for row in scored] == pytest.approx([value for value, _ in expected], abs=1e-4)
    with pytest.raises(UsageError, match="continuation of 11 tokens: the model reads at most 10"):
        scorer([Continuation((1,), tuple(range(11)))])


def test_progress_ends_with_all(tiny_hybrid: Callable[..., HybridForCausalLM]) -> None:
    told: list[tuple[int, int]] = []
    rows = questions()
    LikelihoodScorer(tiny_hybrid(), max_length=128, batch_size=4)(rows, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(rows), len(rows))
    assert told == sorted(told)
    assert len(told) > 2


CPU = torch.device("cpu")


def test_batches_of_a_given_size() -> None:
    assert [list(b) for b in batches(range(7), lambda _: 10**9, batch_size=3, device=CPU)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    with pytest.raises(InvalidOptionError, match="batch_size must be at least 1, not 0"):
        list(batches([1], lambda _: 1, batch_size=0, device=CPU))


def test_batches_by_tokens_hold_every_row_once_and_are_not_too_large() -> None:
    lengths = [700, 400, 300, 300, *[10] * 300, 5000, 1]
    found = list(batches(lengths, lambda n: n, batch_size=None, device=CPU))
    assert [row for batch in found for row in batch] == lengths
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 1024 for batch in found)
    assert [700] in found  # its neighbour would make 1,400
    assert [5000] in found  # more than the budget: alone
    assert list(batches([], lambda n: n, batch_size=None, device=CPU)) == []


def test_halves_where_memory_runs_out() -> None:
    sizes: list[int] = []

    def run(rows: Sequence[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return [row * 10 for row in rows]

    assert halving(run, range(10)) == [row * 10 for row in range(10)]
    assert sizes == [10, 5, 2, 3, 5, 2, 3]
    with pytest.raises(torch.OutOfMemoryError):
        halving(lambda rows: run([1, 2, 3, 4]), [1])
