"""Scoring from Python: what is read once, and scored beside a teacher or alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mambify
from mambify.errors import TokenizerMismatchError, UnknownSourceError
from mambify.workflows.evaluate import evaluate, read_material
from tiny import byte_tokenizer, llama


def test_texts_and_pairs_beside_a_teacher(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    models = []
    for seed in (0, 1):
        llama(len(tokenizer), seed=seed).save_pretrained(tmp_path / str(seed))
        models.append(mambify.load(tmp_path / str(seed)).model)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "chosen": f"fox {i}", "rejected": f"dog {i}"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    material = read_material(
        tokenizer, texts=[text], preferences=[pairs], context_length=32, pair_length=64, announce=said.append
    )
    assert said == [f"{pairs}: 4 pairs"]
    told: dict[str, tuple[int, int, str]] = {}
    result = evaluate(
        models[0],
        models[1],
        material,
        context_length=32,
        batch_size=2,
        progress=lambda what, done, total, note: told.update({what: (done, total, note)}),
    )
    blocks = len(material.texts[str(text)])
    assert told == {str(text): (blocks, blocks, "blocks"), str(pairs): (8, 8, "answers")}
    assert set(result["sources"]) == {str(text)}
    assert set(result["preferences"]) == {str(pairs)}
    alone = evaluate(models[0], None, material, context_length=32)
    perplexity = result["sources"][str(text)]["student"]["perplexity"]
    assert alone["sources"][str(text)]["student"]["perplexity"] == pytest.approx(perplexity)
    assert "reward_accuracy" not in alone["preferences"][str(pairs)]
    assert evaluate(models[0], None, read_material(tokenizer)) == {}


def test_models_that_cannot_be_asked(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    with pytest.raises(UnknownSourceError, match="no tokenizer"):
        read_material(None, texts=[text])
    other = byte_tokenizer()
    other.add_tokens(["word"])
    with pytest.raises(TokenizerMismatchError):
        read_material(byte_tokenizer(), other, texts=[text])
    assert read_material(byte_tokenizer(), other).tokenizer is not other
