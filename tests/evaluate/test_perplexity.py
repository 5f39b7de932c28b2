from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mambify.errors import InvalidOptionError, MambifyError, TokenizerMismatchError, UsageError
from mambify.evaluate import Estimate, evaluate_language_model
from mambify.evaluate.bootstrap import bootstrap
from mambify.evaluate.scoring import Scorer, as_block, make_batch

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def llama(seed: int, vocab_size: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZES)).eval()


def granite(seed: int) -> GraniteForCausalLM:
    """A model that divides its logits after the head."""
    torch.manual_seed(seed)
    return GraniteForCausalLM(GraniteConfig(vocab_size=50, logits_scaling=4.0, **SIZES)).eval()


STUDENT, TEACHER = llama(0), llama(1)


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> np.ndarray[Any, Any]:
    """``[T, V]`` in float64, one block alone, nothing padded."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits.log_softmax(-1).numpy()


def directly(student: PreTrainedModel, teacher: PreTrainedModel, blocks: list[list[int]]) -> dict[str, float]:
    """Every figure by its definition."""
    nll, teacher_nll, kl, agree = [], [], [], []
    for ids in blocks:
        mine, theirs = log_probabilities(student, ids), log_probabilities(teacher, ids)
        for t, following in enumerate(ids[1:]):
            nll.append(-mine[t, following])
            teacher_nll.append(-theirs[t, following])
            kl.append(float(np.sum(np.exp(theirs[t]) * (theirs[t] - mine[t]))))
            agree.append(float(mine[t].argmax() == theirs[t].argmax()))
    return {
        "nll": np.mean(nll),
        "perplexity": np.exp(np.mean(nll)),
        "teacher_nll": np.mean(teacher_nll),
        "teacher_perplexity": np.exp(np.mean(teacher_nll)),
        "perplexity_ratio": np.exp(np.mean(nll) - np.mean(teacher_nll)),
        "kl": np.mean(kl),
        "top1_agreement": np.mean(agree),
    }


def random_blocks(count: int, lengths: tuple[int, int], seed: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    return [chance.integers(0, 50, chance.integers(*lengths)).tolist() for _ in range(count)]


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 256), (4, 7), (16, 1000)])
def test_every_figure_equals_its_definition(batch_size: int, chunk_tokens: int) -> None:
    blocks = random_blocks(9, (2, 20))
    score = evaluate_language_model(STUDENT, blocks, teacher=TEACHER, batch_size=batch_size, chunk_tokens=chunk_tokens)
    for name, value in directly(STUDENT, TEACHER, blocks).items():
        assert getattr(score, name).value == pytest.approx(value, rel=2e-6), name
    assert score.num_blocks == 9
    assert score.num_tokens == sum(len(block) - 1 for block in blocks)


def test_a_model_without_a_teacher_has_no_figures_of_one() -> None:
    blocks = torch.tensor(random_blocks(6, (12, 13)))
    score = evaluate_language_model(STUDENT, blocks)
    assert score.perplexity.value == pytest.approx(directly(STUDENT, STUDENT, blocks.tolist())["perplexity"])
    assert score.kl is score.teacher_perplexity is score.perplexity_ratio is score.top1_agreement is None


def test_a_model_is_at_no_distance_from_itself() -> None:
    score = evaluate_language_model(STUDENT, random_blocks(4, (5, 9)), teacher=STUDENT)
    assert score.kl == Estimate(0.0, 0.0, 0.0)
    assert score.top1_agreement == score.perplexity_ratio == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    blocks = random_blocks(5, (4, 12))
    padded = []
    for block in blocks:
        extra = [3] * (15 - len(block))
        ids, mask = (extra + block, [0] * len(extra) + [1] * len(block)) if side == "left" else (
            block + extra,
            [1] * len(block) + [0] * len(extra),
        )  # fmt: skip
        padded.append({"input_ids": ids, "attention_mask": mask})
    plain = evaluate_language_model(STUDENT, blocks, teacher=TEACHER)
    score = evaluate_language_model(STUDENT, padded, teacher=TEACHER)
    assert score.num_tokens == plain.num_tokens
    assert score.nll.value == pytest.approx(plain.nll.value, rel=1e-5)
    assert score.kl is not None
    assert plain.kl is not None
    assert score.kl.value == pytest.approx(plain.kl.value, rel=1e-5)


def test_labels_say_what_is_counted() -> None:
    ids = random_blocks(1, (12, 13))[0]
    labels = [-100] * 5 + ids[5:]
    score = evaluate_language_model(STUDENT, [{"input_ids": ids, "labels": labels}])
    logp = log_probabilities(STUDENT, ids)
    expected = -np.mean([logp[t, ids[t + 1]] for t in range(4, 11)])
    assert score.num_tokens == 7
    assert score.nll.value == pytest.approx(expected, rel=1e-6)


def test_blocks_come_in_every_form() -> None:
    block = np.array(random_blocks(1, (12, 13))[0], dtype=np.int32)
    block.setflags(write=False)
    forms: list[Any] = [block, block.tolist(), torch.tensor(block.tolist()), {"input_ids": block}]
    scores = [evaluate_language_model(STUDENT, [form]) for form in forms]
    assert scores == scores[:1] * 4


def test_positions_reach_the_model() -> None:
    ids = random_blocks(1, (12, 13))[0]
    scaled = [2 * t for t in range(12)]
    with torch.inference_mode():
        logp = STUDENT(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([scaled]), use_cache=False
        ).logits[0].log_softmax(-1)  # fmt: skip
    expected = -np.mean([logp[t, ids[t + 1]].item() for t in range(11)])
    score = evaluate_language_model(STUDENT, [{"input_ids": ids, "position_ids": scaled}])
    assert score.nll.value == pytest.approx(expected, rel=1e-5)
    assert score.nll.value != pytest.approx(evaluate_language_model(STUDENT, [ids]).nll.value, rel=1e-4)


def test_the_head_is_used_apart_only_where_that_is_all_there_is() -> None:
    scaled, teacher = granite(0), granite(1)
    assert Scorer(STUDENT).splits
    assert not Scorer(scaled).splits
    blocks = random_blocks(5, (3, 12))
    for student, beside in ((scaled, teacher), (scaled, TEACHER), (STUDENT, teacher)):
        score = evaluate_language_model(student, blocks, teacher=beside, batch_size=3, chunk_tokens=4)
        for name, value in directly(student, beside, blocks).items():
            assert getattr(score, name).value == pytest.approx(value, rel=1e-5), name


def test_no_more_than_a_chunk_goes_through_the_head() -> None:
    batch = make_batch([as_block(block) for block in random_blocks(8, (9, 10))], list(range(8)))
    with torch.inference_mode():
        chunks: list[Tensor] = list(Scorer(STUDENT).logits(batch, 10))
    assert [tuple(chunk.shape) for chunk in chunks] == [(10, 50)] * 6 + [(4, 50)]


def test_a_token_ruled_out_by_the_teacher_adds_nothing_and_one_by_the_student_everything() -> None:
    class Bars(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = self.head(hidden)
            return logits.masked_fill(torch.arange(logits.shape[-1]) == 7, -torch.inf)

    barred = llama(1)
    barred.lm_head = Bars(barred.lm_head)
    blocks = [[block for block in ids if block != 7] for ids in random_blocks(3, (9, 12))]
    score = evaluate_language_model(STUDENT, blocks, teacher=barred)
    assert score.kl is not None
    assert 0 < score.kl.value < 100
    score = evaluate_language_model(barred, blocks, teacher=STUDENT)
    assert score.kl is not None
    assert score.kl.value == float("inf")


def test_a_model_in_training_is_evaluated_without_dropout_and_left_in_training() -> None:
    config = LlamaConfig(vocab_size=50, attention_dropout=0.5, **SIZES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    blocks = random_blocks(3, (8, 9))
    assert evaluate_language_model(model, blocks) == evaluate_language_model(model, blocks)
    assert model.training


def test_progress_counts_blocks() -> None:
    seen: list[tuple[int, int]] = []
    evaluate_language_model(
        STUDENT, random_blocks(5, (4, 9)), batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_what_cannot_be_scored_is_an_error() -> None:
    with pytest.raises(TokenizerMismatchError, match="60 tokens and the student one of 50"):
        evaluate_language_model(STUDENT, [[1, 2]], teacher=llama(0, 60))
    blocks: list[Any]
    for blocks in ([], [[1]], [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]):
        with pytest.raises(UsageError, match="no token to evaluate on"):
            evaluate_language_model(STUDENT, blocks)
    wrong: Mapping[str, int]
    for wrong in ({"batch_size": 0}, {"chunk_tokens": 0}, {"resamples": 0}):
        with pytest.raises(InvalidOptionError, match="at least 1"):
            evaluate_language_model(STUDENT, [[1, 2]], **wrong)
    broken = llama(0)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(MambifyError, match="not numbers"):
        evaluate_language_model(broken, [[1, 2, 3]])


def test_intervals_hold_the_value_and_are_the_same_every_time() -> None:
    blocks = random_blocks(30, (5, 15))
    one = evaluate_language_model(STUDENT, blocks, teacher=TEACHER, seed=4)
    for name in ("nll", "perplexity", "teacher_perplexity", "kl", "top1_agreement", "perplexity_ratio"):
        estimate = getattr(one, name)
        assert estimate.low < estimate.value < estimate.high
    assert one == evaluate_language_model(STUDENT, blocks, teacher=TEACHER, seed=4)
    other = evaluate_language_model(STUDENT, blocks, teacher=TEACHER, seed=5)
    assert one.nll.value == other.nll.value
    assert one.nll.low != other.nll.low


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    chance = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        tokens = chance.integers(50, 150, 80).astype(float)
        means = chance.normal(2.0, 0.5, 80)  # a block's own mean; tokens weigh it
        sums = np.stack([tokens, tokens * means], axis=1)
        estimate = bootstrap(sums, {"mean": lambda t: t[..., 1] / t[..., 0]}, resamples=300, seed=trial)["mean"]
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_in_pieces_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.stack([np.ones(40), np.arange(40.0)], axis=1)
    statistic = {"mean": lambda t: t[..., 1] / t[..., 0]}
    whole = bootstrap(sums, statistic, resamples=4000)["mean"]
    monkeypatch.setattr("mambify.evaluate.bootstrap._MAX_WEIGHTS", 1)
    pieces = bootstrap(sums, statistic, resamples=4000)["mean"]
    assert whole.value == pieces.value == 19.5
    error = 40 / 12**0.5 / 40**0.5  # of a mean of 40 draws from 0..39
    for estimate in (whole, pieces):
        assert estimate.low == pytest.approx(19.5 - 1.96 * error, abs=0.3)
        assert estimate.high == pytest.approx(19.5 + 1.96 * error, abs=0.3)


def test_packed_documents_of_several_lengths_are_kept_apart() -> None:
    documents = random_blocks(6, (3, 8))
    blocks = []
    for parts in (documents[:3], documents[3:5], documents[5:]):
        ids = [token for part in parts for token in part]
        positions = [t for part in parts for t in range(len(part))]
        labels = [token if t else -100 for token, t in zip(ids, positions, strict=True)]
        blocks.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    packed = evaluate_language_model(STUDENT, blocks, batch_size=3)
    assert packed.nll.value == pytest.approx(directly(STUDENT, STUDENT, documents)["nll"], rel=1e-5)
