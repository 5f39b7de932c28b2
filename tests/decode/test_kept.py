"""Buffers and graphs that a call leaves for the next one: used where they suit, and never with anything stale.

They are left on a GPU; here the rule is lifted, since everything but the recording is the same on a CPU.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.decode import kept
from mambify.decode.generate import continue_rows
from mambify.engine import Sampling, Speculator
from mambify.errors import InvalidOptionError
from tiny import byte_tokenizer

Hybrid = Callable[..., HybridForCausalLM]
LAYERS = ["mamba2", "attention", "mamba1"]
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Speculator]]:
    """The decoders that calls have made, those that were kept among them."""
    found: list[Any] = []

    def make(*arguments: Any, **settings: Any) -> Speculator:
        speculator = Speculator(*arguments, **settings)
        found.append(weakref.proxy(speculator))
        return speculator

    monkeypatch.setattr(kept, "Speculator", make)
    monkeypatch.setattr(kept, "_records", lambda _: True)
    yield found
    kept._kept.clear()


def say(model: HybridForCausalLM, prompt: list[int] = PROMPT, **settings: Any) -> list[int]:
    return mambify.generate(model, [prompt], **{"max_new_tokens": 20, "eos_token_id": []} | settings)[0]


def fresh(model: HybridForCausalLM, prompt: list[int] = PROMPT, **settings: Any) -> list[int]:
    """What a copy of the model says, of which nothing was ever kept."""
    if isinstance(settings.get("draft"), HybridForCausalLM):
        settings["draft"] = copy.deepcopy(settings["draft"])
    return say(copy.deepcopy(model), prompt, **settings)


def test_calls_alike_share_one(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS)
    prompts = [PROMPT, [9], list(range(3, 60))]
    found = [say(model, prompt, temperature=0.9, seed=n) for n, prompt in enumerate(prompts)]
    assert len(made) == 1 and made[0].max_length == 256
    say(model, max_new_tokens=30, temperature=0.9)  # seed, length and budget are the run's
    assert len(made) == 1
    assert found == [fresh(model, prompt, temperature=0.9, seed=n) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"repetition_penalty": 1.3},
        {"eos_token_id": [4]},
        {"draft": "lookup"},
        {"draft": "cut:1"},
        {"max_new_tokens": 300},
    ],
    ids=str,
)
def test_calls_of_another_kind_do_not(other: dict[str, Any], tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS, max_position_embeddings=512)
    say(model)
    assert say(model, seed=1, **other) == fresh(model, seed=1, **other)
    assert len(made) == 3  # the copy's is the third
    assert say(model) == fresh(model)
    assert len(made) == 4  # another copy's


@pytest.mark.parametrize("draft", [None, "lookup", "cut:1", "own"])
def test_training_between_two_calls(draft: str | None, tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS)
    settings: dict[str, Any] = {"draft": tiny_hybrid(["mamba2"], seed=3) if draft == "own" else draft}
    before = say(model, **settings)
    for trained in {id(m): m for m in (model, settings["draft"]) if isinstance(m, HybridForCausalLM)}.values():
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        for _ in range(3):
            trained(input_ids=torch.tensor([[*PROMPT, 11, 12, 13]]), labels=torch.tensor([[3] * 7])).loss.backward()
            optimizer.step()
    made.clear()
    after = say(model, **settings)
    assert not made and after != before
    assert after == fresh(model, **settings)


@pytest.mark.parametrize("backend", ["modules", "fused"])
def test_a_decoder_sees_that_weights_have_changed(backend: str, tiny_hybrid: Hybrid) -> None:
    """In rings, in the fused step too, a decay rate is made of a weight beforehand."""
    model = tiny_hybrid(LAYERS)
    settings: dict[str, Any] = {"num_slots": 1, "max_length": 40, "sampling": Sampling(0.0), "backend": backend}
    one = Speculator(model, "lookup", **settings)
    answers = []
    for change in (0.0, 1.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter += change
        answers.append([token for _, found in one.run([PROMPT], max_new_tokens=30) for token in found])
        again = Speculator(model, "lookup", **settings)
        assert answers[-1] == [token for _, found in again.run([PROMPT], max_new_tokens=30) for token in found]
    assert answers[0] != answers[1]


def _replace_a_weight(model: HybridForCausalLM) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))


def _load_others(model: HybridForCausalLM) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def _move(model: HybridForCausalLM) -> None:
    model.double()


@pytest.mark.parametrize("change", [_replace_a_weight, _load_others, _move])
def test_replaced_weights_are_seen(
    change: Callable[[HybridForCausalLM], None], tiny_hybrid: Hybrid, made: list[Speculator]
) -> None:
    model = tiny_hybrid(LAYERS)
    say(model)
    say(model, draft="lookup")
    old = [weakref.ref(each.speculator) for each in kept._kept[model]]
    change(model)
    assert say(model) == fresh(model)
    gc.collect()
    assert not any(reference() for reference in old)


def test_nothing_is_kept_where_a_hook_or_an_adapter_has_a_say(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS)
    say(model)
    hook = model.model.norm.register_forward_hook(lambda module, inputs, output: -output)
    assert say(model) != fresh(tiny_hybrid(LAYERS))
    assert model not in kept._kept
    hook.remove()
    model(torch.tensor([PROMPT]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    say(model)
    assert model in kept._kept

    class Adapter(torch.nn.Linear):
        on = True

    model.lm_head.__class__ = Adapter
    say(model)
    assert model not in kept._kept


def test_it_goes_with_the_model(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model, draft = tiny_hybrid(LAYERS), tiny_hybrid(["mamba2"], seed=3)
    say(model)
    say(model, draft=draft)
    assert len(kept._kept[model]) == 2
    gone = weakref.ref(draft.model.layers[0])
    del draft
    gc.collect()
    assert gone() is None and len(kept._kept[model]) == 1
    gone = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert gone() is None and not kept._kept


def test_it_can_be_let_go_of(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS)
    mambify.release(model)  # nothing yet
    first = say(model)
    mambify.release(model)
    assert model not in kept._kept
    assert say(model) == first and len(made) == 2


def test_few_and_small_ones_are_kept(
    tiny_hybrid: Hybrid, made: list[Speculator], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hybrid(LAYERS)
    for penalty in (1.1, 1.2, 1.3):
        say(model, repetition_penalty=penalty)
    assert [each.wanted.sampling.repetition_penalty for each in kept._kept[model]] == [1.2, 1.3]
    monkeypatch.setattr(kept, "free_memory", lambda _: 1000)
    say(model, repetition_penalty=1.4)
    assert made[-1:] and model not in kept._kept


def test_answers_side_by_side(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_hybrid(LAYERS, vocab_size=len(tokenizer))
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    wanted = [list(mambify.stream(model, tokenizer, "one", seed=seed, **settings)) for seed in (1, 2)]
    streams = [mambify.stream(model, tokenizer, "one", seed=seed, **settings) for seed in (1, 2)]
    pieces: list[list[str]] = [[], []]
    for turn in range(40):
        pieces[turn % 2] += [piece for piece in [next(streams[turn % 2], None)] if piece is not None]
    assert pieces == wanted
    assert len(made) == 2


@pytest.mark.parametrize("stop", [None, "e", "never"])
def test_an_answer_that_ends_leaves_it(stop: str | None, tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    """At an end token, at a stop string, and at the last token."""
    tokenizer = byte_tokenizer()
    model = tiny_hybrid(LAYERS, vocab_size=len(tokenizer))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 10)) if stop is None else 2
    settings: dict[str, Any] = {"max_new_tokens": 120, "temperature": 1.0, "seed": 1, "stop": stop}
    if stop == "never":
        settings["max_new_tokens"] = 3
    first = mambify.stream(model, tokenizer, "one", **settings)
    text = "".join(first)
    assert first.ended == (stop != "never")
    assert "".join(mambify.stream(model, tokenizer, "one", **settings)) == text
    assert len(made) == 1


def test_whoever_stops_listening_leaves_nothing(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_hybrid(LAYERS, vocab_size=len(tokenizer))
    stream = mambify.stream(model, tokenizer, "one", max_new_tokens=20, temperature=1.0, seed=1)
    next(stream)
    del stream
    gc.collect()
    assert not kept._kept


def test_an_error_leaves_nothing(tiny_hybrid: Hybrid, made: list[Speculator]) -> None:
    model = tiny_hybrid(LAYERS)
    tokens = []

    def fail(number: int, new: list[int]) -> int | None:
        tokens.append(number)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        continue_rows(model, [PROMPT], Sampling(0.0), max_new_tokens=20, stop_ids=[], ends=fail)
    assert tokens
    with pytest.raises(InvalidOptionError, match="vocabulary"):
        say(model, draft=tiny_hybrid(["mamba2"], vocab_size=50))
    assert say(model) == fresh(model)


@pytest.mark.gpu
def test_on_a_gpu(tiny_hybrid: Hybrid) -> None:
    """Recorded rounds: weights that training changed are read where they lie, and memory is free at once."""
    model = tiny_hybrid(LAYERS).cuda()
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    for draft in (None, "lookup"):
        say(model, draft=draft, **settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.7 if name.endswith("A_log") else 0.05 * parameter
        speculator = kept._kept[model][-1].speculator
        assert say(model, draft=draft, **settings) == fresh(model, draft=draft, **settings)
        assert kept._kept[model][-1].speculator is speculator
    gone = weakref.ref(model.model.layers[0])
    del model, speculator, parameter
    assert gone() is None
