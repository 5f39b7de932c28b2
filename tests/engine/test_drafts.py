"""Laws of drafts that are unlike their target: cut from it, with part of its words, with a K that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mambify.conversion.cut import choose_layers, cut, most_frequent
from mambify.engine import Sampling, Speculator, Statistics, rounded_shares, written_shares
from mambify.engine.memory import read_bytes, working_bytes
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.accept import accept_drafts
from mambify.ops.draw import draw_tokens, settings_of
from mambify.ops.draw.reference import weights
from mambify.trimmed_head import columns_of
from speculating import (
    GREEDY,
    PROMPTS,
    TARGETS,
    VOCABULARY,
    EveryNumber,
    answers,
    converted,
    feature_draft,
    greedy,
    model,
    target_and_tokens,
)


@pytest.fixture
def every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambify.engine.speculate.Pace", EveryNumber)


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize(("mixer", "attention"), TARGETS)
@pytest.mark.parametrize("kind", ["lookup", "cut", "hybrid", "target"])
def test_greedy_tokens_are_the_targets_while_k_changes(
    teacher: HybridForCausalLM, mixer: str, attention: float, kind: str
) -> None:
    target, wanted = target_and_tokens(teacher, mixer, attention, new=40)
    drafts: dict[str, Any] = {
        "lookup": "lookup", "cut": cut(target, 2), "hybrid": converted(teacher, mixer), "target": target
    }  # fmt: skip
    speculator = Speculator(target, drafts[kind], num_slots=4, max_length=80, sampling=GREEDY, num_draft_tokens=(1, 6))
    assert answers(speculator, PROMPTS, max_new_tokens=40) == wanted
    statistics = speculator.statistics
    assert len(statistics.drafted) == 6 and sum(statistics.drafted.values()) == sum(statistics.accepted)
    if kind == "target":  # but after a text of one token, when nothing is put forward
        assert set(statistics.acceptance_by_position[1:]) == {1.0}


@pytest.mark.parametrize("kind", ["lookup", "cut", "target"])
def test_greedy_tokens_are_the_targets_with_auto(teacher: HybridForCausalLM, kind: str) -> None:
    target, wanted = target_and_tokens(teacher, new=40)
    drafts: dict[str, Any] = {"lookup": "lookup", "cut": cut(target, [0, 3]), "target": target}
    speculator = Speculator(target, drafts[kind], num_slots=2, max_length=80, sampling=GREEDY, num_draft_tokens="auto")
    assert answers(speculator, PROMPTS, max_new_tokens=40) == wanted


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize("words", [4, 8])
@pytest.mark.parametrize("made", [cut, feature_draft])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9)], ids=["plain", "cut"])
def test_drawn_tokens_follow_the_target(tmp_path: Path, sampling: Sampling, made: Any, words: int) -> None:
    """Pairs of tokens, of a draft that knows half of the words or all of them, against the target's distribution."""
    target = converted(model(tmp_path, vocabulary=8, initializer_range=0.4))
    draft = made(target, 2, token_ids=torch.arange(8)[8 - words :] if words < 8 else None)
    samples, prompt = 6000, [3]
    speculator = Speculator(target, draft, num_slots=samples, max_length=8, sampling=sampling, num_draft_tokens=(1, 3))
    found = torch.tensor(answers(speculator, [prompt] * samples, max_new_tokens=2, seeds=list(range(samples))))
    counts = torch.bincount(found[:, 0] * 8 + found[:, 1], minlength=64).double() / samples
    with torch.no_grad():

        def distribution(ids: list[int]) -> torch.Tensor:
            logits = target(input_ids=torch.tensor([ids])).logits[:, -1]
            weight = weights(logits, settings_of(**sampling.settings(), rows=1, device=logits.device))[0]
            return weight / weight.sum()

        first = distribution(prompt)
        wanted = torch.cat([first[token] * distribution([*prompt, token]) for token in range(8)])
    assert (counts - wanted).abs().sum() / 2 < 0.06  # 6000 draws among 64 pairs stray by about 0.04
    assert ((counts > 0) <= (wanted > 0)).all()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_one_round_with_part_of_the_words_is_exact(settings: dict[str, Any], backend: str) -> None:
    """The first token of 200,000 rounds is the target's own, though the draft never says 7 of the 12 words."""
    generator = torch.Generator().manual_seed(0)
    S, V, known = 200_000, 12, torch.tensor([1, 4, 5, 8, 11])
    target = (2 * torch.randn(1, 2, V, generator=generator)).expand(S, -1, -1)
    draft = (2 * torch.randn(1, 1, 5, generator=generator)).expand(S, -1, -1)
    numbers = torch.rand(S, 3, generator=generator)
    drafted = draw_tokens(draft[:, 0], numbers[:, 0], ids_V=known, **settings)[:, None]
    kept, after = accept_drafts(
        target, draft, drafted, numbers[:, 1:], draft_columns_V=columns_of(known, V), backend=backend, **settings
    )
    first = torch.where(kept > 0, drafted[:, 0], after)
    found = torch.bincount(first, minlength=V).double() / S
    weight = weights(target[:1, 0], settings_of(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings), rows=1, device=target.device))[0]  # fmt: skip # noqa: E501
    assert (found - weight / weight.sum()).abs().sum() / 2 < 0.01
    if settings.get("temperature") != 0.0:
        q = torch.zeros(V).index_copy(0, known, torch.ones(5))
        assert kept.double().mean() > 0 and (q[drafted] == 1).all()


@pytest.mark.parametrize("attention", [1.0, 0.5])
def test_greedy_tokens_with_part_of_the_words(teacher: HybridForCausalLM, attention: float) -> None:
    target = teacher if attention == 1.0 else converted(teacher)
    draft = cut(target, 3, token_ids=torch.arange(0, VOCABULARY, 3))
    speculator = Speculator(target, draft, num_slots=3, max_length=64, sampling=GREEDY, num_draft_tokens=3)
    assert answers(speculator, PROMPTS, max_new_tokens=25) == [greedy(target, prompt, 25) for prompt in PROMPTS]
    with torch.no_grad():
        logits = draft(input_ids=torch.tensor([PROMPTS[0]])).logits
    assert logits.shape[-1] == VOCABULARY
    assert (logits.softmax(-1) > 0).sum(-1).eq(VOCABULARY // 3).all()


def test_a_whole_cut_is_the_target(teacher: HybridForCausalLM) -> None:
    """All layers and all words: the same logits, from the same tensors."""
    ids = torch.tensor([PROMPTS[2]])
    for target in (teacher, converted(teacher), converted(teacher, "mamba1", 0.0)):
        whole = cut(target, 4)
        assert {p.data_ptr() for p in whole.parameters()} == {p.data_ptr() for p in target.parameters()}
        with torch.no_grad():
            assert torch.equal(whole(input_ids=ids).logits, target(input_ids=ids).logits)
            every = cut(target, 4, token_ids=torch.arange(VOCABULARY))
            assert torch.equal(every(input_ids=ids).logits, target(input_ids=ids).logits)


def test_which_layers_are_cut(teacher: HybridForCausalLM) -> None:
    assert choose_layers(32, 2) == [0, 31]
    assert choose_layers(32, 4) == [0, 10, 20, 31]
    assert choose_layers(32, 4, "ends") == [0, 1, 30, 31]
    assert choose_layers(32, 3, "ends") == [0, 1, 31]
    assert choose_layers(32, 3, "first") == [0, 1, 2]
    assert choose_layers(32, 1) == [0]
    for call, words in (
        (lambda: choose_layers(4, 5), "choose 1 to 4"),
        (lambda: choose_layers(4, 2, "evenly"), "did you mean 'even'"),
        (lambda: cut(teacher, [0, 4]), "layers 0 to 3"),
        (lambda: cut(teacher, [2, 1]), "rising order"),
        (lambda: most_frequent(torch.tensor([1, 2]), 9, 8), "choose 1 to 8"),
    ):
        with pytest.raises(InvalidOptionError, match=words):
            call()


def test_the_most_frequent_words() -> None:
    text = torch.tensor([[3, 3, 3, 1], [1, 5, 0, 3]])
    assert most_frequent(text, 2, 8).tolist() == [1, 3]
    assert most_frequent(text, 4, 8).tolist() == [0, 1, 3, 5]
    assert most_frequent(text, 3, 8, always=[7]).tolist() == [1, 3, 7]


@pytest.mark.usefixtures("every_number")
@pytest.mark.parametrize("words", [VOCABULARY, VOCABULARY // 3])
@pytest.mark.parametrize("backend", ["modules", "fused"])
def test_a_penalty_while_k_changes_and_words_are_few(teacher: HybridForCausalLM, words: int, backend: str) -> None:
    """The draft's words are penalised where they stand in its head; what knows all words keeps all it puts forward."""
    target = converted(teacher)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.5)
    settings: dict[str, Any] = {"num_slots": 3, "max_length": 80, "sampling": sampling}
    plain = answers(Speculator(target, None, **settings), PROMPTS, max_new_tokens=40)
    draft = cut(target, 4, token_ids=torch.arange(0, VOCABULARY, VOCABULARY // words))
    speculator = Speculator(target, draft, num_draft_tokens=(1, 6), backend=backend, **settings)
    assert answers(speculator, PROMPTS, max_new_tokens=40) == plain
    statistics = speculator.statistics
    assert (set(statistics.acceptance_by_position[1:]) == {1.0}) == (words == VOCABULARY)
    assert len(statistics.drafted) == 6 and statistics.seconds > 0


def test_a_trimmed_model_is_no_target(teacher: HybridForCausalLM) -> None:
    draft = cut(teacher, 2, token_ids=torch.arange(9))
    with pytest.raises(InvalidOptionError, match="give a whole model"):
        Speculator(draft, "lookup", num_slots=1, max_length=20, sampling=GREEDY)


def test_a_trimmed_model_says_its_own_words(teacher: HybridForCausalLM) -> None:
    """By itself, without a draft, as any model; and bytes to read and to work with are those of its head."""
    draft = cut(teacher, 2, token_ids=torch.arange(1, VOCABULARY, 4))
    speculator = Speculator(draft, None, num_slots=2, max_length=40, sampling=GREEDY)
    assert answers(speculator, PROMPTS[:3], max_new_tokens=20) == [greedy(draft, prompt, 20) for prompt in PROMPTS[:3]]
    rows, whole = draft.lm_head.weight.shape[0], cut(teacher, 2)
    assert read_bytes(whole) - read_bytes(draft) == (VOCABULARY - rows) * draft.config.hidden_size * 4
    for K in (1, 4):  # of V logits the target has K + 1, and the draft's K are kept twice
        each = working_bytes([teacher], most_new=K + 1, penalises=False) / (K + 1)
        assert working_bytes([teacher, whole], most_new=K + 1, penalises=False) == (3 * K + 1) * each
        assert working_bytes([teacher, draft], most_new=K + 1, penalises=False) == (2 * K + 1 + 2 * K / 4) * each


def test_bytes_that_rounds_read_by_their_k(teacher: HybridForCausalLM) -> None:
    speculator = Speculator(
        teacher, cut(teacher, 1), num_slots=1, max_length=40, sampling=GREEDY, num_draft_tokens="auto"
    )
    one, two, five = (speculator.read_bytes(10, K) for K in (1, 2, 5))
    assert five - two == 3 * (two - one) == 3 * read_bytes(cut(teacher, 1), length=10)


def test_acceptance_counts_only_rounds_that_drafted_so_far() -> None:
    statistics = Statistics()
    statistics.add(1, [4, 6, 0], passes=5, seconds=1.0)  # ten rounds of one token, six of which kept it
    statistics.add(2, [2, 3, 5], passes=5, seconds=2.0)  # ten of two: eight kept the first, five of them the second too
    assert statistics.acceptance_by_position == [14 / 20, 5 / 8]
    untried = Statistics()
    untried.add(2, [5, 0, 0, 0], passes=5, seconds=1.0)  # the second never came to its turn, a third was never drafted
    assert untried.acceptance_by_position == [0.0, None, None]
    assert rounded_shares(untried.acceptance_by_position) == [0.0, None, None]
    assert written_shares([0.5, *untried.acceptance_by_position]) == ["50%", "0%", "–", "–"]
    assert statistics.drafted == {1: 10, 2: 10}
    assert (statistics.passes, statistics.rounds, statistics.seconds) == ({1: 5, 2: 5}, 10, 3.0)


@pytest.mark.parametrize("kind", [cut, feature_draft])
@pytest.mark.parametrize("K", [1, 3])
@torch.inference_mode()
def test_what_is_drafted_can_be_taken_back(teacher: HybridForCausalLM, kind: Any, K: int) -> None:
    """As benchmarks do, which draft by itself, again and again."""
    target = converted(teacher)
    speculator = Speculator(target, kind(target, 2), num_slots=2, max_length=64, sampling=GREEDY, num_draft_tokens=K)
    run = speculator.run(PROMPTS[:2], max_new_tokens=30)
    next(run), next(run)
    assert speculator.draft is not None and speculator.active_S.all()
    length_S = speculator.draft.tower.length_S.clone()
    found = []
    for _ in range(3):
        speculator.put_forward(K)
        found.append(speculator._read_ST.tolist())
        speculator.draft.take_back(K)
    assert found[0] == found[1] == found[2]
    assert speculator.draft.tower.length_S.tolist() == length_S.tolist()
    wanted = [greedy(target, prompt, 30) for prompt in PROMPTS[:2]]
    rest = [token for number, piece in run for token in piece if number == 0]
    assert rest == wanted[0][-len(rest) :]
