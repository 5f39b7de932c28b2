"""Preference pairs: what rows may look like, what is dropped, and where the loss begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mambify.data.preferences import PreferenceDataset, as_blocks, describe, read_preferences
from mambify.errors import UnknownSourceError, UnsupportedError, UsageError
from tiny import byte_tokenizer

USER, GOOD, BAD = "How are you?", "I am well.", "Go away."


def _write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _turn(role: str, words: str) -> dict[str, str]:
    return {"role": role, "content": words}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {"prompt": USER, "chosen": [_turn("assistant", GOOD)], "rejected": [_turn("assistant", BAD)]},
        {"prompt": [_turn("user", USER)], "chosen": GOOD, "rejected": [_turn("assistant", BAD)]},
        *(
            {"chosen": [_turn("user", USER), _turn("assistant", GOOD)]} | more
            for more in (
                {"rejected": [_turn("user", USER), _turn("assistant", BAD)]},
                {"prompt": USER, "rejected": [_turn("user", USER), _turn("assistant", BAD)]},
            )
        ),
    ],
)
def test_all_ways_to_write_a_pair_are_one(tmp_path: Path, row: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    (pair,) = read_preferences(_write(tmp_path, row), tokenizer).pairs
    for document, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        assert tokenizer.decode(document.input_ids[document.loss_start :]) == f"{answer}<|im_end|>"
        opening = f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(document.input_ids[: document.loss_start]) == opening


def test_what_both_have_said_before_is_no_answer(tmp_path: Path) -> None:
    before = [_turn("user", "Hello"), _turn("assistant", "Good day."), _turn("user", USER)]
    row = {"prompt": before, "chosen": GOOD, "rejected": BAD}
    data = PreferenceDataset(read_preferences(_write(tmp_path, row), byte_tokenizer()).pairs, 128, dropped={})
    labels = data[0]["labels"]
    said = [byte_tokenizer().decode(row[row >= 0]) for row in labels]
    assert said == [f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]


def test_useless_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {"prompt": USER, "chosen": GOOD, "rejected": GOOD},
        {"prompt": USER, "chosen": GOOD, "rejected": ""},
        {"prompt": USER * 20, "chosen": GOOD, "rejected": BAD},
    ]
    read = read_preferences(_write(tmp_path, *rows), byte_tokenizer())
    data = PreferenceDataset(read.pairs, 96, dropped=read.dropped)
    assert describe(len(data), data.dropped) == "1 pairs, 3 dropped (1 identical, 1 empty, 1 too long)"


def test_rows_have_one_length_and_labels_on_answers_only(tmp_path: Path) -> None:
    row = {"prompt": USER, "chosen": GOOD * 10, "rejected": BAD}
    data = PreferenceDataset(read_preferences(_write(tmp_path, row), byte_tokenizer()).pairs, 64, dropped={})
    item, (pair,) = data[0], data.pairs
    assert item["input_ids"].shape == item["labels"].shape == (2, 64)
    assert item["lengths"].tolist() == [64, len(pair.rejected)]
    assert float(item["mean_tokens"]) == 64 + len(pair.rejected)
    start, end = pair.rejected.loss_start, len(pair.rejected)
    assert (item["labels"][1] >= 0).nonzero()[:, 0].tolist() == list(range(start, end))
    ((chosen, rejected),) = as_blocks(data)
    assert rejected["input_ids"].tolist() == item["input_ids"][1, :end].tolist()
    assert chosen["labels"].tolist() == item["labels"][0].tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": USER, "chosen": GOOD}, r"line 1: expected \{prompt, chosen, rejected\}"),
        ({"chosen": GOOD, "rejected": BAD}, "an answer without a prompt"),
        ({"prompt": USER, "chosen": GOOD, "rejected": 3}, "line 1, rejected"),
        ({"prompt": USER, "chosen": GOOD, "rejected": [_turn("user", "x"), _turn("assistant", "y")]}, "same turn"),
        ({"prompt": USER, "chosen": GOOD, "rejected": GOOD}, r"no usable pair of answers \(1 dropped\)"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_preferences(_write(tmp_path, row), byte_tokenizer())


def test_a_tokenizer_without_a_template_and_a_missing_file(tmp_path: Path) -> None:
    path = _write(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD})
    with pytest.raises(UnsupportedError, match="chat template"):
        read_preferences(path, byte_tokenizer(template=None))
    with pytest.raises(UnknownSourceError, match="nowhere"):
        read_preferences(tmp_path / "nowhere.jsonl", byte_tokenizer())


def test_nothing_fits_the_context(tmp_path: Path) -> None:
    read = read_preferences(_write(tmp_path, {"prompt": USER, "chosen": GOOD, "rejected": BAD}), byte_tokenizer())
    with pytest.raises(UsageError, match="within 8 tokens"):
        PreferenceDataset(read.pairs, 8, dropped={})


def test_real_pairs(shared_data: Path) -> None:
    """The rows that are known to be identical or empty, and no other, are dropped."""
    for name, usable, useless in (("train1000", 994, 6), ("eval200", 199, 1)):
        read = read_preferences(shared_data / "train_pref" / f"ultrafeedback_binarized_{name}.jsonl", byte_tokenizer())
        assert (len(read.pairs), sum(read.dropped.values())) == (usable, useless)
