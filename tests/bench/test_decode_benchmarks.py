"""``bench verify``, ``speculate`` and ``laws`` compare like with like; everything at sizes of no interest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mambify.bench import clock, laws, speculate_real, speculate_shapes, verify
from mambify.bench.decode_steps import drawn_model, pass_seconds, read_weight_bytes
from mambify.bench.injected import InjectedSpeculator, rates_for
from mambify.bench.pace import pace_of
from mambify.bench.questions import CHAT, CODE_AND_MATH, read_questions
from mambify.bench.registry import run_benchmark
from mambify.cli.main import main
from mambify.engine import Sampling, Speculator
from mambify.errors import InvalidOptionError, UsageError
from mambify.families.load import load, save
from speculating import feature_draft
from tiny import byte_tokenizer, llama


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SECONDS", 1e-9)
    monkeypatch.setattr(clock, "_AT_MOST", 0.0)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(laws, "SIZES", {"cpu": laws.Size(4, 8, 200, 100)})
    monkeypatch.setattr(speculate_real, "SIZES", {"cpu": speculate_real.Size(2, 24, (2, 4), (16, 100))})


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tokenizer = byte_tokenizer()
    llama(len(tokenizer), num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows: list[dict[str, Any]] = [
        {"category": "writing", "turns": ["Tell me a story.", "Another one."]},
        {"category": "coding", "turns": ["Sort a list."]},
        {"category": "rag", "turns": ["Who was it?"]},
        {"question": "What is 2 + 2?", "answer": "4"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def test_verification_counts_what_each_way_moves_and_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        verify, "CASES", {"cpu": [verify.Case("batch", "tiny", 2, 5), verify.Case("pass", "tiny", 2, 3)]}
    )
    layer, whole = run_benchmark("verify", device="cpu")["results"]
    replay, steps = layer["ways"]["replay"], layer["ways"]["steps"]
    state = 4 * 2 * 4 * 16 * 16
    assert steps["held_bytes"] == 6 * state
    assert state < replay["held_bytes"] < 2 * state + 32 * 2 * (2 * 2 * 16 + 4) * 4
    assert replay["bytes"] < steps["bytes"]
    assert layer["rounds_between_folds"] == 8  # rings of 32 places, 10 of them kept free, 3 more filled in each round
    assert whole["over_plain"] == whole["ms"] / whole["plain_ms"]


def test_no_time_is_given_for_a_layer_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CASES", {"cpu": [verify.Case("batch", "tiny", 2, 5)]})
    monkeypatch.setattr(verify, "largest_difference", lambda *_: 1.0)
    (row,) = run_benchmark("verify", device="cpu")["results"]
    assert "off by" in row["red"] and "ways" not in row


def test_acceptance_is_as_it_was_injected() -> None:
    assert rates_for(1.0, 4)[0] == pytest.approx(0.0, abs=1e-9)
    assert rates_for(5.0, 4)[0] == pytest.approx(1.0)
    assert sum(rates_for(3.3, 4)[0] ** k for k in range(5)) == pytest.approx(3.3)
    with pytest.raises(InvalidOptionError, match="1 to 4"):
        rates_for(4.04, 3)
    target, draft = drawn_model("tiny", "cpu", attention=0.5), drawn_model("tiny", "cpu", num_hidden_layers=1)
    speculator = InjectedSpeculator(
        target, draft, rates=[0.9, 0.5, 0.0], num_slots=20, max_length=200, sampling=Sampling()
    )
    list(speculator.run([[1, 2]] * 20, max_new_tokens=190))
    found = speculator.statistics.acceptance_by_position
    assert found[0] == pytest.approx(0.9, abs=0.04) and found[1] == pytest.approx(0.5, abs=0.06) and found[2] == 0.0


def test_acceptance_by_position_is_injected_whatever_k_is() -> None:
    target, draft = drawn_model("tiny", "cpu", attention=0.5), drawn_model("tiny", "cpu", num_hidden_layers=1)
    speculator = InjectedSpeculator(
        target, draft, rates=[1.0, 1.0, 0.0], num_slots=4, max_length=80, sampling=Sampling(), num_draft_tokens=(2, 3)
    )
    list(speculator.run([[1, 2]] * 4, max_new_tokens=60))
    assert speculator.statistics.acceptance_by_position[:2] == [1.0, 1.0]
    assert set(speculator.statistics.passes) <= {2, 3} and not any(speculator.statistics.accepted[3:])


def test_a_pace_counts_what_comes_between_looks() -> None:
    model = drawn_model("tiny", "cpu", attention=0.5)
    decoder = Speculator(model, None, num_slots=3, max_length=40, sampling=Sampling(temperature=0.0))
    pace = pace_of(decoder, [[1], [2, 3], [4]], max_new_tokens=20)
    assert [len(answer) for answer in pace.answers] == [20, 20, 20]
    assert (pace.tokens, pace.rounds) == (57, 19) and pace.seconds > 0  # all but the first look's token of each
    assert decoder.statistics.rounds == 20 and decoder.statistics.seconds > 0


def test_bytes_that_a_pass_reads() -> None:
    tied = drawn_model("tiny", "cpu")
    assert read_weight_bytes(tied) == sum(weight.nbytes for weight in tied.parameters())
    own = drawn_model("tiny", "cpu", words=100, tie_word_embeddings=False)
    assert read_weight_bytes(own) == sum(w.nbytes for w in own.parameters()) - own.model.embed_tokens.weight.nbytes
    logits = own(input_ids=torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == 512 and (logits[..., 100:] == -torch.inf).all()
    assert pass_seconds(tied, slots=2, new=3, context=10) > 0


def test_shapes() -> None:
    result = run_benchmark("speculate", device="cpu")
    assert [row["part"] for row in result["results"]] == ["8B", "batch", "paper", "K"]
    assert [row["K"] for row in result["results"]] == [4, 2, 3, "auto"]
    assert 1 <= result["results"][-1]["mean_K"] <= 8
    for row in result["results"]:
        assert row["acceptance"] == "injected"
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * row["tokens_per_round"] / row["round_ms"])
        assert (
            1 <= row["drawn_tokens_per_round"] <= (9 if row["adaptive"] else row["K"] + 1)
            and row["drawn_tokens_per_second"] > 0
        )
        assert row["ratio"] == row["tokens_per_second"] / row["plain_tokens_per_second"]
        assert row["round_ms"] == pytest.approx(row["draft_ms"] + row["verify_ms"] + row["rest_ms"])
    assert {case.part for case in speculate_shapes.CASES["cuda"]} == {"8B", "K", "batch", "paper"}


def test_questions_are_grouped_by_what_they_ask_for(questions: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    found = read_questions([questions], tokenizer)
    assert {group: len(prompts) for group, prompts in found.items()} == {CHAT: 1, CODE_AND_MATH: 2, "rag": 1}
    assert "Tell me a story." in tokenizer.decode(found[CHAT][0]) and "assistant" in tokenizer.decode(found[CHAT][0])
    assert set(read_questions([], tokenizer)) == {CHAT, CODE_AND_MATH}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"turns": ["a"]}\n{"turns": []}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 2: a question needs"):
        read_questions([bad], tokenizer)
    with pytest.raises(UsageError, match="no data at"):
        read_questions([tmp_path / "none"], tokenizer)


def test_real_models(saved: str, questions: Path) -> None:
    result = run_benchmark("speculate", device="cpu", target=saved, draft=["lookup", saved], prompts=[questions])
    rows = [row for row in result["results"] if "K" in row]
    assert {row["draft"] for row in rows} == {"lookup", saved} and {row["K"] for row in rows} == {2, 4, "auto"}
    assert {row["group"] for row in rows} == {CHAT, CODE_AND_MATH, "rag"}
    for row in rows:
        assert row["tokens"] <= 24 * row["prompts"]
        if row["temperature"] == 0:
            assert row["same_answers"] == 1.0
            if row["draft"] == saved:
                assert row["acceptance_by_position"][0] == 1.0
    assert all("Error" in row["failed"] for row in result["results"] if "peer" in row)
    contexts = [row for row in result["results"] if row["part"] == "context"]
    assert [(row["model"], row["context"]) for row in contexts] == [
        ("target", 16), ("target", 100), (saved, 16), (saved, 100)
    ]  # fmt: skip


def test_laws_of_a_given_model(saved: str, questions: Path) -> None:
    result = run_benchmark(
        "laws", device="cpu", only="greedy", target=saved, draft=["lookup", saved], prompts=[questions]
    )
    assert all(row["passes"] for row in result["results"])
    tried = [(row["dtype"], row["draft"], row["damaged"]) for row in result["results"]]
    assert tried == [
        ("float32", "lookup", False), ("float32", saved, False),
        ("bfloat16", "lookup", False), ("bfloat16", saved, False),
        ("float32", "lookup", True),
    ]  # fmt: skip
    assert result["results"][0]["prompts"] == 4


def test_laws_of_another_size(saved: str, questions: Path) -> None:
    given = {"target": saved, "prompts": [questions], "limit": 2, "max_new_tokens": 3}
    first = run_benchmark("laws", device="cpu", only="greedy", **given)["results"][0]
    assert (first["prompts"], first["tokens"]) == (2, 6)
    drawn = run_benchmark("laws", device="cpu", only="distribution", samples=30)["results"]
    assert {row["samples"] for row in drawn} == {30}


def test_a_draft_that_reads_hidden_states(saved: str, questions: Path, tmp_path: Path) -> None:
    """Lawful, and asked for nothing by itself."""
    loaded, reader = load(saved), str(tmp_path / "reader")
    save(feature_draft(loaded.model), reader, tokenizer=loaded.tokenizer)
    result = run_benchmark("laws", device="cpu", only="greedy", target=saved, draft=[reader], prompts=[questions])
    assert all(row["passes"] for row in result["results"])
    result = run_benchmark("speculate", device="cpu", only="context", target=saved, draft=[reader])
    assert {row["model"] for row in result["results"]} == {"target"}
    decoder = Speculator(loaded.model, load(reader).model, num_slots=2, max_length=64, sampling=Sampling(0.0))
    step = decoder.pretend(40)
    with torch.inference_mode():
        for _ in range(3):
            step()
    assert decoder.draft.tower.length_S.tolist() == (decoder.target.length_S + 1).tolist()


def test_from_the_command_line(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "verify", "--device", "cpu", "--only", "pass", "--plot", str(tmp_path / "v.svg")]) == 0
    assert main(["bench", "speculate", "--device", "cpu", "--only", "context", "--target", saved]) == 0
    assert "keys, values and states" in " ".join(capsys.readouterr().out.split())
    for command, words in (
        (["speculate", "--only", "temperature-0"], "name one with --target"),
        (["speculate", "--only", "nothing"], "no part 'nothing'"),
        (["speculate", "--only", "8B", "--target", saved], "no part '8B'"),
        (["speculate", "--target", saved, "--draft", "lookup", "--draft", str(tmp_path / "none")], "none"),
        (["laws", "--target", saved, "--draft", "lookup", "--draft", str(tmp_path / "none")], "none"),
        (["verify", "--target", saved], "it is for export, speculate, laws"),
        (["laws", "--only", "nothing"], "nothing in 'laws' is called 'nothing'"),
    ):
        assert main(["bench", *command, "--device", "cpu"]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
