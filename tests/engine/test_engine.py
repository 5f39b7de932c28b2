"""The decode engine gives what a forward pass over the whole sequence gives, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import mambify
from mambify import HybridForCausalLM
from mambify.conversion.cut import cut
from mambify.engine import DecodeEngine, Sampling, Turn
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel

Hybrid = Callable[..., HybridForCausalLM]
GREEDY = Sampling(temperature=0.0)
LAYERS = {
    "hybrid": ["mamba2", "attention", "mamba1", "attention"],
    "mamba2": ["mamba2", "mamba2"],
    "attention": ["attention", "attention"],
}


@dataclass
class Talk:
    """A sequence with its later turns' given tokens; ``ids`` is all of it."""

    prompt: list[int]
    limit: int = 12
    later: list[list[int]] = field(default_factory=list)
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)

    def begin(self) -> Turn:
        self.ids = list(self.prompt)
        return Turn(self.prompt, self.limit)

    def hear(self, ids: list[int]) -> Turn | None:
        self.said.append(ids)
        if len(self.said) > len(self.later):
            self.ids += ids
            return None
        given = self.later[len(self.said) - 1]
        self.ids += [*ids[:-1], *given]
        return Turn(given, self.limit)


@torch.no_grad()
def alone(model: HybridForCausalLM, talk: Talk, stops: set[int]) -> list[int]:
    """The same sequence from forward passes over all of it, greedily."""
    ids = list(talk.prompt)
    for turn in range(len(talk.later) + 1):
        for _ in range(talk.limit):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
        if turn < len(talk.later):
            ids = ids[:-1] + talk.later[turn]
    return ids


def engine_for(
    model: HybridForCausalLM, *, slots: int, sampling: Sampling = GREEDY, stops: set[int], backend: str = "auto"
) -> DecodeEngine:
    return DecodeEngine(
        model, num_slots=slots, max_length=60, max_given=8, sampling=sampling, stop_ids=sorted(stops), backend=backend
    )  # fmt: skip


def talks() -> list[Talk]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for number in range(11):
        length = 3 + number % 4
        tail = torch.randint(3, 96, (length,), generator=draw).tolist()
        later = [torch.randint(3, 96, (1 + number % 3,), generator=draw).tolist() for _ in range(number % 3)]
        made.append(Talk([1, 7, *tail], limit=3 + number, later=later))
    return made


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_greedy_turns_equal_forward_passes(layers: str, slots: int, tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid(LAYERS[layers])
    expected = [alone(model, talk, {5, 40, 41}) for talk in talks()]
    engine = engine_for(model, slots=slots, stops={5, 40, 41})
    for _ in range(2):  # the second run finds what the first one left in the slots
        given = talks()
        engine.run(given)
        assert [talk.ids for talk in given] == expected


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("slots", [4, 16])  # states that are written at once, where all can be, and rings
def test_the_fused_step_says_the_same(
    layers: str, slots: int, tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: fixed buffers in rings, and parts of them as the batch shrinks; also after a change of weights."""
    monkeypatch.setattr("mambify.engine.engine._SMALLEST", 1)
    model = tiny_hybrid(LAYERS[layers], seed=1)
    engine = engine_for(model, slots=slots, stops={5, 40, 41}, backend="fused")
    for _ in range(2):
        expected, given = [alone(model, talk, {5, 40, 41}) for talk in talks()], talks()
        engine.run(given)
        assert [talk.ids for talk in given] == expected
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.7 if name.endswith("A_log") else 0.05 * parameter


def test_a_draft_that_knows_part_of_the_vocabulary_says_its_words(tiny_hybrid: Hybrid) -> None:
    model = cut(tiny_hybrid(LAYERS["hybrid"]), 2, token_ids=torch.arange(1, 96, 3))
    talk = Talk([1, 7, 9], limit=12)
    engine_for(model, slots=2, stops=set()).run([talk])
    assert talk.ids == alone(model, Talk([1, 7, 9], limit=12), set())
    assert all(token % 3 == 1 for token in talk.ids[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("layers", LAYERS)
def test_recorded_steps_on_a_gpu_give_the_same(
    layers: str, tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs, a host that is one window behind, and slots that move: nothing of it shows."""
    monkeypatch.setattr("mambify.engine.engine._SMALLEST", 1)
    model = tiny_hybrid(LAYERS[layers])
    expected = [alone(model, talk, {5, 40, 41}) for talk in talks()]
    model.cuda()
    for slots in (1, 4, 16):
        engine = engine_for(model, slots=slots, stops={5, 40, 41})
        for _ in range(2):
            given = talks()
            engine.run(given)
            assert [talk.ids for talk in given] == expected


def test_a_sliding_window_is_kept(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid(["attention", "mamba2", "attention"], sliding_window=6)
    prompt = list(range(10, 24))  # longer than the window, and read at once but for its last token
    talk = Talk(prompt, limit=15)
    engine_for(model, slots=2, stops=set()).run([talk])
    assert talk.ids == alone(model, Talk(prompt, limit=15), set())


def test_the_batch_shrinks_and_rows_that_move_go_on(tiny_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambify.engine.engine._SMALLEST", 1)
    model = tiny_hybrid(LAYERS["hybrid"])
    given = [Talk([1, 7, 10 + n], limit=3 if n % 4 else 30) for n in range(16)]
    expected = [alone(model, talk, set()) for talk in given]
    engine = engine_for(model, slots=16, stops=set())
    sizes = []
    for size, step in list(engine._steps.items()):
        engine._steps[size] = lambda size=size, step=step: (sizes.append(size), step())
    engine.run(given)
    assert [talk.ids for talk in given] == expected
    assert sizes[0] == 16 and sizes[-1] == 4


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_company(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid(LAYERS["hybrid"])
    sampling = Sampling(temperature=1.0, top_k=40)
    results = []
    for slots in (2, 7):
        given = [Talk([1, 7, 9], limit=10, seed=n) for n in range(9)]
        engine_for(model, slots=slots, sampling=sampling, stops={5}).run(given)
        results.append([talk.ids for talk in given])
    assert results[0] == results[1]
    assert len(set(map(tuple, results[0]))) > 5


def test_tokens_are_drawn_from_the_model(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid(LAYERS["attention"])
    with torch.no_grad():
        expected = model(torch.tensor([[1, 7, 9]])).logits[0, -1].softmax(-1)
    given = [Talk([1, 7, 9], limit=1, seed=n * 7919) for n in range(20_000)]
    engine_for(model, slots=5000, sampling=Sampling(), stops={5}).run(given)
    seen = torch.bincount(torch.tensor([talk.ids[-1] for talk in given]), minlength=len(expected)) / len(given)
    assert (seen - expected).abs().max() < 4 * (0.25 / len(given)) ** 0.5


def test_a_turn_that_does_not_fit_is_refused(tiny_hybrid: Hybrid) -> None:
    engine = engine_for(tiny_hybrid(LAYERS["attention"]), slots=2, stops=set())
    with pytest.raises(InvalidOptionError, match="does not fit slots of 60 tokens"):
        engine.run([Talk([1, 2, 3], limit=58)])
    with pytest.raises(InvalidOptionError, match="9 of them given at once"):
        engine.run([Talk([1]), Talk([2, *range(3, 12)])])


def test_nobody_to_speak(tiny_hybrid: Hybrid) -> None:
    engine = engine_for(tiny_hybrid(LAYERS["hybrid"]), slots=1, stops=set())
    engine.run([])
    talk = Talk([1, 2, 3], limit=5)
    engine.run([talk])
    assert len(talk.ids) == 8


def test_a_run_within_a_run_is_refused(tiny_hybrid: Hybrid) -> None:
    """It would put its sequences into slots that are taken."""
    model = tiny_hybrid(LAYERS["hybrid"])
    engine = engine_for(model, slots=1, stops=set())

    class Asks(Talk):
        def hear(self, ids: list[int]) -> Turn | None:
            with pytest.raises(InvalidOptionError, match="a run is under way"):
                engine.run([Talk([1, 2, 3])])
            return super().hear(ids)

    asks = Asks([1, 7, 8], later=[[9]])
    engine.run([asks])
    assert asks.ids == alone(model, Talk([1, 7, 8], later=[[9]]), set())


def test_the_real_teacher_says_the_same(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    questions = ["What is the capital of France?", "Name a colour."]
    given = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        given.append(Talk(prompt, limit=6))
    engine = DecodeEngine(
        smollm2.model,
        num_slots=2,
        max_length=64,
        max_given=32,
        sampling=GREEDY,
        stop_ids=[tokenizer.eos_token_id],
    )
    engine.run(given)
    assert "Paris" in tokenizer.decode(given[0].ids)
    for talk in given:
        ids = torch.tensor([talk.prompt])
        expected = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert talk.ids == expected[0].tolist()


def test_it_is_the_sampler_of_synthesize(smollm2: LoadedModel) -> None:
    """On a CPU batches are faster and the default; slots must write conversations of the same form."""
    from mambify.data.sampler import Sampler, Settings

    settings = Settings(
        1000, "chat", temperature=0.8, top_k=20, max_user_tokens=8, max_new_tokens=8, turns=2, batch_size=3
    )
    sampler = Sampler(smollm2.model, mambify.families.load.require_tokenizer(smollm2), settings)
    sampler.in_slots = True
    torch.manual_seed(0)
    heard: list[int] = []
    documents = sampler.sample("chat", 5, heard.append)
    assert sorted(heard) == sorted(map(len, documents))
    form = sampler.format
    assert form is not None and documents
    for document in documents:
        assert tuple(document.input_ids[: len(form.before_user)]) == form.before_user
        assert len(document) <= sampler.longest
        assert document.messages[0]["role"] == "user"
    again = Sampler(smollm2.model, sampler.tokenizer, settings)
    again.in_slots = True
    torch.manual_seed(0)
    assert [d.id for d in again.sample("chat", 5)] == [d.id for d in documents]
