from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mambify.data import Manifest, read_documents, synthesize
from mambify.data import sampler as sampler_module
from mambify.data.documents import is_heldout
from mambify.errors import (
    InvalidOptionError,
    MambifyError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from mambify.model import HybridForCausalLM

MakeModel = Callable[..., LlamaForCausalLM]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
SMALL: dict[str, Any] = {
    "num_tokens": 3000,
    "max_new_tokens": 24,
    "max_user_tokens": 12,
    "batch_size": 8,
    "documents_per_shard": 24,
    "heldout": 0.2,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rows(directory: Path, split: str = "*") -> list[dict[str, Any]]:
    files = sorted(directory.glob(f"{split}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "data"
    synthesize(model, tokenizer, out, kind="mixed", **SMALL)
    return out


def test_the_files_hold_what_the_manifest_says(mixed: Path) -> None:
    manifest = Manifest.read(mixed)
    assert manifest.complete
    assert len(manifest.shards) > 2
    for split, totals in manifest.totals.items():
        found = rows(mixed, split)
        assert totals == {"documents": len(found), "tokens": sum(len(row["input_ids"]) for row in found)}
        assert found
    assert manifest.num_documents == len(rows(mixed))
    longest = max(len(row["input_ids"]) for row in rows(mixed))
    assert SMALL["num_tokens"] <= manifest.num_tokens < SMALL["num_tokens"] + longest
    by_kind = manifest.tokens_by_kind
    assert abs(by_kind["chat"] - by_kind["text"]) <= longest * len(manifest.shards)
    assert not list(mixed.glob(".*"))


def test_documents_are_what_their_ids_say(mixed: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    opening = tokenizer.encode("<|im_start|>system w1 w2<|im_end|><|im_start|>user")
    answer = tokenizer.encode("<|im_end|><|im_start|>assistant")
    kinds = set()
    for row in rows(mixed):
        ids, start = row["input_ids"], row["loss_start"]
        kinds.add(row["kind"])
        if row["kind"] == "text":
            assert ids[0] == 0
            assert start == 1
            assert row["messages"] is None
            assert ids[-1] in {0, 2} or len(ids) == 1 + SMALL["max_new_tokens"]
            assert not {0, 2} & set(ids[1:-1])
            continue
        assert ids[: len(opening)] == opening
        assert row["text"] == tokenizer.decode(ids)
        if len(row["messages"]) == 1:  # the user never came to an end
            assert start == len(ids) == len(opening) + SMALL["max_user_tokens"]
            continue
        assert ids[start - len(answer) : start] == answer
        assert ids[-1] in {0, 2} or len(ids) - start == SMALL["max_new_tokens"]
        said = tokenizer.decode(ids[len(opening) : start - len(answer)], skip_special_tokens=True)
        assert row["messages"][0] == {"role": "user", "content": said.strip()}
        said = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert row["messages"][1] == {"role": "assistant", "content": said.strip()}
    assert kinds == {"chat", "text"}


def test_no_text_twice_and_the_split_follows_the_id_alone(mixed: Path) -> None:
    ids = [row["id"] for row in rows(mixed)]
    assert len(ids) == len(set(ids))
    assert len({row["text"] for row in rows(mixed)}) == len(ids)
    assert all(is_heldout(row["id"], 0.2) for row in rows(mixed, "heldout"))
    assert not any(is_heldout(row["id"], 0.2) for row in rows(mixed, "train"))


def test_the_share_held_out_is_the_share_asked_for() -> None:
    from mambify.data.documents import document_id

    ids = [document_id(str(i)) for i in range(20_000)]
    assert abs(sum(is_heldout(i, 0.02) for i in ids) / 20_000 - 0.02) < 0.004
    assert not any(is_heldout(i, 0.0) for i in ids)
    small = {i for i in ids if is_heldout(i, 0.02)}
    assert small <= {i for i in ids if is_heldout(i, 0.05)}  # a larger share only adds


def test_the_same_command_writes_the_same_bytes_and_leaves_the_random_state(
    tmp_path: Path, mixed: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    model.train()
    synthesize(model, tokenizer, tmp_path / "again", kind="mixed", **SMALL)
    assert model.training
    model.eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert contents(tmp_path / "again") == contents(mixed)
    other = synthesize(model, tokenizer, tmp_path / "other", kind="mixed", seed=1, **SMALL)
    texts = {row["text"] for row in rows(mixed)}
    shared = sum(row["text"] in texts for row in rows(tmp_path / "other"))
    assert shared < 0.2 * other.num_documents


class Killed(BaseException):
    """Stands for the process's end: nothing may catch it and clean up."""


@pytest.mark.parametrize("calls", [1, 5, 11])
def test_a_killed_run_started_again_writes_the_same_bytes(
    calls: int,
    tmp_path: Path,
    mixed: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample, made = sampler_module.sample_continuations, 0

    def counted(*args: Any, **kwargs: Any) -> list[list[int]]:
        nonlocal made
        made += 1
        if made > calls:
            raise Killed
        return sample(*args, **kwargs)

    monkeypatch.setattr(sampler_module, "sample_continuations", counted)
    with pytest.raises(Killed):
        synthesize(model, tokenizer, tmp_path / "data", kind="mixed", **SMALL)
    assert not Manifest.read(tmp_path / "data").complete
    with pytest.raises(UsageError, match="unfinished"):
        read_documents(tmp_path / "data", tokenizer)
    monkeypatch.undo()
    # What a process leaves that dies inside a write: a temporary file, and a shard the manifest does not name.
    (tmp_path / "data" / ".train-00007.jsonl.abc").write_text("half a li")
    (tmp_path / "data" / "train-00003.jsonl").write_text("half a li")
    synthesize(model, tokenizer, tmp_path / "data", kind="mixed", **SMALL)
    assert contents(tmp_path / "data") == contents(mixed)


def test_lost_and_damaged_shards_are_sampled_again(
    tmp_path: Path, mixed: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    out = tmp_path / "data"
    synthesize(model, tokenizer, out, kind="mixed", **SMALL)
    last = len(Manifest.read(out).shards) - 1
    (out / f"train-{last:05d}.jsonl").unlink()
    damaged = out / f"train-{last - 1:05d}.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"train-\d+.jsonl is missing or was altered"):
        read_documents(out, tokenizer)
    synthesize(model, tokenizer, out, kind="mixed", **SMALL)
    assert contents(out) == contents(mixed)


def test_a_finished_directory_is_not_sampled_again(
    mixed: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler_module, "sample_continuations", None)
    assert synthesize(model, tokenizer, mixed, kind="mixed", **SMALL) == Manifest.read(mixed)


def test_other_settings_need_another_directory(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    new_model: MakeModel,
    new_tokenizer: MakeTokenizer,
) -> None:
    settings = SMALL | {"num_tokens": 300}
    out = tmp_path / "data"
    synthesize(model, tokenizer, out, **settings)
    before = contents(out)
    with pytest.raises(InvalidOptionError, match=r"temperature was 1\.0, is now 0\.5"):
        synthesize(model, tokenizer, out, **settings | {"temperature": 0.5})
    with pytest.raises(InvalidOptionError, match="teacher_weights"):
        synthesize(new_model(len(tokenizer), seed=1), tokenizer, out, **settings)
    with pytest.raises(InvalidOptionError, match="tokenizer"):
        synthesize(model, new_tokenizer(num_words=39), out, **settings)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    synthesize(model, tokenizer, out, **settings | {"temperature": 0.5, "overwrite": True})
    assert contents(out).pop("notes.txt") == b"mine"
    assert Manifest.read(out).settings["temperature"] == 0.5


def test_what_is_not_synthesized_text_is_left_alone(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError):
        synthesize(model, tokenizer, tmp_path, **SMALL)
    with pytest.raises(OutputExistsError):
        synthesize(model, tokenizer, tmp_path / "thesis.txt", **SMALL)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(UsageError, match="not a manifest"):
        synthesize(model, tokenizer, tmp_path / "odd", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "odd"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_tokens": 0},
        {"kind": "chats"},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"batch_size": 0},
        {"documents_per_shard": 0},
        {"max_new_tokens": 0},
        {"turns": 0},
        {"heldout": 1.0},
        {"max_new_tokens": 250},  # beyond the model's positions
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    wrong: dict[str, Any], tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InvalidOptionError):
        synthesize(model, tokenizer, tmp_path / "data", **SMALL | wrong)
    assert not list(tmp_path.iterdir())


def test_only_attention_has_a_limit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_hybrid: Callable[..., HybridForCausalLM]
) -> None:
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 30}
    settings = SMALL | {"num_tokens": 100}
    with pytest.raises(InvalidOptionError, match="30 positions"):
        synthesize(tiny_hybrid(["mamba2", "attention"], **sizes), tokenizer, tmp_path / "data", **settings)
    assert synthesize(tiny_hybrid(["mamba2", "mamba1"], **sizes), tokenizer, tmp_path / "data", **settings).complete


def test_auto_follows_the_template(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, new_tokenizer: MakeTokenizer
) -> None:
    settings = SMALL | {"num_tokens": 200}
    assert set(synthesize(model, tokenizer, tmp_path / "a", **settings).tokens_by_kind) == {"chat"}
    base = new_tokenizer(template=None)
    assert set(synthesize(model, base, tmp_path / "b", **settings).tokens_by_kind) == {"text"}
    with pytest.raises(UnsupportedError, match="no chat template"):
        synthesize(model, base, tmp_path / "c", kind="chat", **settings)
    assert not (tmp_path / "c").exists()


def test_conversations_of_several_turns(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = {"max_user_tokens": 40, "max_new_tokens": 30}
    synthesize(model, tokenizer, tmp_path / "data", turns=3, **SMALL | lengths)
    found = rows(tmp_path / "data")
    assert {len(row["messages"]) for row in found} >= {2, 4, 6}
    for row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles == (["user", "assistant"] * 3)[: len(roles)]
        assert all(message["content"] for message in row["messages"])


def test_a_conversation_is_what_the_template_writes(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = random.Random(0)

    def words(model: object, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        return [[*chance.choices(range(7, 47), k=chance.randint(1, 9)), 2] for _ in prompts]

    monkeypatch.setattr(sampler_module, "sample_continuations", words)
    synthesize(model, tokenizer, tmp_path / "data", turns=3, **SMALL)
    for row in rows(tmp_path / "data"):
        assert len(row["messages"]) == 6
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert row["input_ids"] == tokenizer.encode(whole)


def test_duplicates_and_empty_turns_are_dropped(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the teacher says, call by call: questions, then answers. 10.. are words, 2 ends a turn.
    script = iter(
        [
            [[10, 2], [10, 2], [2], [11, 2]],  # two alike, one empty
            [[12, 2], [12, 2], [2]],  # answers of the three that asked: the last says nothing
        ]
    )
    news = iter(range(20, 47))

    def scripted(model: object, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        answers = next(script, None)
        return answers if answers is not None else [[next(news), 2] for _ in prompts]

    monkeypatch.setattr(sampler_module, "sample_continuations", scripted)
    settings = SMALL | {"num_tokens": 100, "batch_size": 4, "documents_per_shard": 8, "heldout": 0.0}
    synthesize(model, tokenizer, tmp_path / "data", **settings)
    said = [[message["content"] for message in row["messages"]] for row in rows(tmp_path / "data")]
    assert said[0] == ["w3", "w5"]
    assert said.count(["w3", "w5"]) == 1
    assert all(len(turns) == 2 for turns in said)
    assert not any("w4" in turns for turns in said)


def test_a_teacher_that_repeats_itself_is_an_error_not_an_endless_loop(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler_module, "sample_continuations", lambda model, prompts, **_: [[10, 2]] * len(prompts))
    with pytest.raises(MambifyError, match="repeats itself"):
        synthesize(model, tokenizer, tmp_path / "data", **SMALL)


def test_progress_rises_to_the_number_asked_for(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[tuple[int, int]] = []
    synthesize(model, tokenizer, tmp_path / "data", progress=lambda done, total: seen.append((done, total)), **SMALL)
    assert seen == sorted(seen)
    assert seen[-1] == (3000, 3000)
    assert len(seen) > 5


# ---- questions that are given ----------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """47 questions in several forms, some twice, ten of three turns, one with a system message, one too long."""
    given: list[Any] = [f"w{i} w{i + 3}" for i in range(10)]
    given += [{"prompt": f"w{i} w5", "response": "w1 w2 w3"} for i in range(10)] + [{"prompt": "w0 w5"}]
    given += [{"question": f"w{i} w6"} for i in range(10)]
    given += [{"instruction": f"w{i} w7", "input": "w4" if i else ""} for i in range(7)]
    given += [{"instruction": "w30 w31", "instances": [{"input": "w32", "output": "w1"}]}]
    given += [{"turns": [f"w8 w{i}", "w3 w3", "w2"]} for i in range(20, 30)]
    given += [{"messages": [{"role": "system", "content": "w6 w6"}, {"role": "user", "content": "w1"},
                            {"role": "assistant", "content": "w2"}]}]  # fmt: skip
    given += [" ".join(["w1"] * 60)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


ASKED: dict[str, Any] = {**SMALL, "max_user_tokens": 40}


def test_given_questions_are_answered(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    manifest = synthesize(model, tokenizer, tmp_path / "a", prompts=prompts, **ASKED)
    assert "left out of 48 questions, being longer than 40 tokens: 1" in caplog.text
    assert manifest.complete
    answer = tokenizer.encode("<|im_end|><|im_start|>assistant")
    found = rows(tmp_path / "a")
    asked = {row["messages"][0]["content"] for row in found}
    assert {"w0 w3", "w9 w5", "w4 w6", "w3 w7\n\nw4", "w0 w7", "w30 w31\n\nw32", "w8 w21", "w6 w6"} <= asked
    assert 40 < len(asked) <= 47  # what is answered by nothing is left out
    for row in found:
        roles = [message["role"] for message in row["messages"]]
        assert roles[-1] == "assistant"
        assert "".join(role[0] for role in roles).removeprefix("s") in ("ua", "uaua", "uauaua")
        ids = row["input_ids"]
        for start, end in row.get("answers") or [[row["loss_start"], len(ids)]]:
            assert ids[start - len(answer) : start] == answer
            assert end - start <= ASKED["max_new_tokens"]
    dialogue = max(found, key=lambda row: len(row["messages"]))
    assert [message["content"] for message in dialogue["messages"][2::2]] == ["w3 w3", "w2"]
    assert len(dialogue["answers"]) == 3
    told = next(row for row in found if row["messages"][0]["role"] == "system")
    opening = tokenizer.encode("<|im_start|>system w6 w6<|im_end|><|im_start|>user w1<|im_end|><|im_start|>assistant")
    assert told["input_ids"][: told["loss_start"]] == opening


def test_answers_to_a_question_stay_on_one_side(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path
) -> None:
    synthesize(model, tokenizer, tmp_path / "a", prompts=[prompts], **ASKED)
    sides = [{row["origin"] for row in rows(tmp_path / "a", split)} for split in ("train", "heldout")]
    assert min(map(len, sides)) > 3
    assert not sides[0] & sides[1]
    read = [read_documents(tmp_path / "a", tokenizer, split=split) for split in ("train", "heldout")]
    assert all(document.origin is not None for document in [*read[0], *read[1]])


def test_answering_is_continued_where_it_was(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path
) -> None:
    """To the same bytes; and not with other questions."""
    synthesize(model, tokenizer, tmp_path / "a", prompts=prompts, **ASKED)
    manifest = Manifest.read(tmp_path / "a")
    assert len(manifest.shards) > 2
    for name in ("a", "b"):
        synthesize(model, tokenizer, tmp_path / name, prompts=prompts, **ASKED)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "b" / manifest.shards[1].files[0].name).unlink()
    synthesize(model, tokenizer, tmp_path / "b", prompts=prompts, **ASKED)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prompts.write_text('"w1 w1"\n')
    for other in (prompts, None):
        with pytest.raises(InvalidOptionError, match="questions was"):
            synthesize(model, tokenizer, tmp_path / "b", prompts=other, **ASKED)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (3, "expected text"),
        ({"text": "w1"}, "no question among 'text'"),
        ({"prompt": " "}, "must be text and not empty"),
        ({"instruction": 3}, "must be text and not empty"),
        ({"turns": []}, "needs a user's turn"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "needs a user's turn"),
        ({"messages": [{"role": "tool", "content": "w1"}, {"role": "user", "content": "w1"}]}, "no role but system"),
    ],
)
def test_what_is_no_question(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, row: Any, words: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(["w1", row]))
    with pytest.raises(UsageError, match=f"row 2: .*{words}"):
        synthesize(model, tokenizer, tmp_path / "a", prompts=path, **SMALL)
    assert not (tmp_path / "a").exists()


def test_questions_that_cannot_be_asked(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Path, tmp_path: Path
) -> None:
    for settings, error, words in (
        ({"kind": "text"}, InvalidOptionError, "go with kind chat, not text"),
        ({"turns": 2}, InvalidOptionError, "leave turns out"),
        ({"max_user_tokens": 2}, UsageError, "all 51 are longer than 2 tokens"),
        ({"prompts": tmp_path / "none.jsonl"}, UsageError, "none.jsonl"),
    ):
        with pytest.raises(error, match=words):
            synthesize(model, tokenizer, tmp_path / "a", **{**ASKED, "prompts": prompts, **settings})
    assert not (tmp_path / "a").exists()
