from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mambify.data import Document, read_documents, synthesize
from mambify.errors import (
    InvalidOptionError,
    MissingDependencyError,
    TokenizerMismatchError,
    UnknownSourceError,
    UnsupportedError,
    UsageError,
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(document.input_ids.tolist()))


def test_every_kind_of_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"text": "w5 w6"},
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w7"}]},
        {"prompt": "w8", "response": "w9"},
        {"instruction": "w10", "input": "w11", "output": "w12"},
        {"instruction": "w13", "instances": [{"input": "", "output": "w14"}]},
    )
    read = read_documents(path, tokenizer, split="all")
    assert words(tokenizer, read[0]) == "<|endoftext|> w5 w6 <|endoftext|>"
    assert (read[0].kind, read[0].loss_start, read[0].messages) == ("text", 1, None)
    opening = "<|im_start|> system w1 w2 <|im_end|> <|im_start|> user"
    answers = [("w3", "w4"), ("w3", "w7"), ("w8", "w9"), ("w10 w11", "w12"), ("w13", "w14")]
    for document, (asked, answered) in zip(read[1:], answers, strict=True):
        head = f"{opening} {asked} <|im_end|> <|im_start|> assistant"
        assert words(tokenizer, document) == f"{head} {answered} <|im_end|>"
        assert document.kind == "chat"
        assert document.loss_start == len(head.split())
        assert document.messages is not None
        assert document.messages[1]["content"] == answered


def test_a_list_in_json_and_a_byte_order_mark(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "w1"}, {"text": "w2"}]', encoding="utf-8-sig")
    assert [d.text for d in read_documents(path, tokenizer, split="all")] == ["w1", "w2"]


def test_the_split_is_by_document_whatever_the_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": f"w{i % 40} w{i // 40}"} for i in range(800)]
    path, turned = (
        write_rows(tmp_path / "a.jsonl", *rows),
        write_rows(tmp_path / "b.jsonl", *rows[::-1]),
    )
    train = {d.id for d in read_documents(path, tokenizer, split="train", heldout=0.1)}
    held = {d.id for d in read_documents(path, tokenizer, split="heldout", heldout=0.1)}
    assert not train & held
    assert len(train) + len(held) == 800
    assert 40 < len(held) < 130
    assert held == {d.id for d in read_documents(turned, tokenizer, split="heldout", heldout=0.1)}


def test_a_text_file_is_one_document_or_passages(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "book.txt"
    paragraphs = ["\n".join([f"w{i % 40} w{i // 40} w5"] * 25) for i in range(60)]
    path.write_bytes("\n\n".join(paragraphs).replace("\n", "\r\n").encode("utf-8-sig"))
    (whole,) = read_documents(path, tokenizer, split="all")
    assert whole.text == "\n\n".join(paragraphs)
    train = read_documents(path, tokenizer, split="train", heldout=0.3)
    held = read_documents(path, tokenizer, split="heldout", heldout=0.3)
    assert len(train) > 1 <= len(held)
    # Every paragraph is on one side, whole.
    sides = [{p for d in side for p in d.text.split("\n\n")} for side in (train, held)]
    assert sides[0] | sides[1] == set(paragraphs)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("between", [" \n \n", " \n"])
def test_a_text_without_empty_lines_is_split_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, between: str
) -> None:
    path = tmp_path / "wiki.txt"
    lines = [" ".join(f"w{(i * j + i // 40) % 37}" for j in range(1, 60)) for i in range(300)]
    path.write_text(between.join(lines), encoding="utf-8")
    sides = [read_documents(path, tokenizer, split=split, heldout=0.3) for split in ("train", "heldout")]
    assert all(len(side) > 3 for side in sides)
    passages = [document.text for side in sides for document in side]
    assert max(map(len, passages)) < 3000
    whole = {line.strip() for text in passages for line in text.split("\n") if line.strip()}
    assert whole == set(lines)
    path.write_text("w1 " * 5000 + "\n" + "w2 w3", encoding="utf-8")  # a line is never cut
    kept = read_documents(path, tokenizer, split="train", heldout=0.0)
    assert [document.text.strip() for document in kept] == [("w1 " * 5000).strip(), "w2 w3"]


def test_synthesized_text_comes_back_as_it_was_sampled(
    tmp_path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    new_tokenizer: MakeTokenizer,
) -> None:
    out = tmp_path / "data"
    manifest = synthesize(
        model, tokenizer, out, num_tokens=1500, max_new_tokens=20, max_user_tokens=9, batch_size=8, heldout=0.3
    )
    for split in ("train", "heldout"):
        lines = (out / f"{split}-00000.jsonl").read_text("utf-8").splitlines()
        read = read_documents(out, tokenizer, split=split)  # type: ignore[arg-type]
        assert [document.to_json() for document in read] == [json.loads(line) for line in lines]
    assert len(read_documents(out, tokenizer, split="all")) == manifest.num_documents
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        read_documents(out, new_tokenizer(num_words=39))


def test_a_mixture_follows_its_weights_and_a_plain_list_does_not_mix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = write_rows(tmp_path / "long.jsonl", *({"text": f"w1 w{i % 40} " + "w2 " * i} for i in range(4, 60)))
    short = write_rows(tmp_path / "short.jsonl", *({"text": f"w3 w{i % 40}"} for i in range(4000)))
    mixed = read_documents([(long, 1.0), (short, 3.0)], tokenizer, split="all")
    tokens = {"w1": 0, "w3": 0}
    for document in mixed:
        tokens[document.text[:2]] += len(document)
    longest = 64
    assert abs(tokens["w3"] - 3 * tokens["w1"]) <= 4 * longest
    assert sum(d.text.startswith("w1") for d in mixed) == 56  # until the first source runs out
    both = read_documents([long, short], tokenizer, split="all")
    assert len(both) == 56 + 4000
    few = read_documents([str(short)], tokenizer, split="all", max_tokens=40)
    assert sum(map(len, few)) == 40
    with pytest.raises(UsageError, match="a weight, or none"):
        read_documents([(long, 1.0), short], tokenizer)
    with pytest.raises(UsageError, match="above 0"):
        read_documents([(long, 0.0)], tokenizer)
    with pytest.raises(UsageError, match="empty list"):
        read_documents([], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not json", "line 2: not JSON"),
        ('"a string"', "line 2: expected an object"),
        ('{"title": "w1"}', "line 2: no usable field among 'title'"),
        ("{}", "no usable field among none"),
        ('{"text": 5}', "'text' must be text"),
        ('{"text": " "}', "not empty"),
        ('{"prompt": "w1"}', "a prompt without an answer"),
        ('{"prompt": "w1", "response": ""}', "'response' must be text"),
        ('{"messages": []}', "'messages' must be a list"),
        ('{"messages": ["w1"]}', "a turn must be an object"),
        ('{"messages": [{"role": "user"}]}', "a turn needs"),
        ('{"messages": [{"role": "user", "content": "w1"}]}', "line 2: .* without an assistant"),
    ],
)
def test_a_bad_row_is_named(row: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "w1"}}\n{row}\n')
    with pytest.raises(UsageError, match=message) as caught:
        read_documents(path, tokenizer, split="all")
    assert str(path) in str(caught.value)


def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, new_tokenizer: MakeTokenizer
) -> None:
    with pytest.raises(UnknownSourceError, match="no data at"):
        read_documents(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(UsageError, match="not a synthesized directory"):
        read_documents(tmp_path, tokenizer)
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UsageError, match="known file types"):
        read_documents(tmp_path / "data.csv", tokenizer)
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_documents(tmp_path / "latin.txt", tokenizer)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="has no documents"):
        read_documents(tmp_path / "empty.txt", tokenizer, split="all")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(UsageError, match="expected a list"):
        read_documents(tmp_path / "object.json", tokenizer)
    chat = write_rows(tmp_path / "chat.jsonl", {"prompt": "w1", "response": "w2"})
    with pytest.raises(UnsupportedError, match=r"chat.jsonl, line 1: .* no chat template"):
        read_documents(chat, new_tokenizer(template=None), split="all")
    with pytest.raises(InvalidOptionError, match="split"):
        read_documents(chat, tokenizer, split="test")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="heldout"):
        read_documents(chat, tokenizer, heldout=1.0)
    one = write_rows(tmp_path / "one.jsonl", {"text": "w1"})
    with pytest.raises(UsageError, match="no heldout documents"):
        read_documents(one, tokenizer, split="heldout", heldout=0.0)


def test_a_hub_data_set_needs_its_package(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="datasets"):
        read_documents("hf:org/name", tokenizer)


def test_a_hub_data_set_is_read_by_name_and_split(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    class Datasets:
        @staticmethod
        def load_dataset(name: str, *, split: str) -> list[dict[str, str]]:
            asked.append((name, split))
            if name == "absent":
                raise FileNotFoundError("no such data set\nand more")
            return [{"text": "w1"}, {"title": "w2"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(UsageError, match="hf:org/name:validation, row 1: no usable field"):
        read_documents("hf:org/name:validation", tokenizer, split="all")
    assert [d.text for d in read_documents("hf:org/name", tokenizer, split="all", max_tokens=1)] == ["w1"]
    assert asked == [("org/name", "validation"), ("org/name", "train")]
    with pytest.raises(UnknownSourceError, match=r"no such data set$"):
        read_documents("hf:absent", tokenizer)


def test_a_document_does_not_change() -> None:
    document = Document("a", "text", "w1", np.array([1, 2]))
    with pytest.raises(ValueError, match="read-only"):
        document.input_ids[0] = 5
