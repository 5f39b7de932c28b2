"""Scoring from Python: what is read once, and scored beside a teacher or alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mambify
from mambify.data.documents import read_documents
from mambify.errors import InvalidOptionError, TokenizerMismatchError, UnknownSourceError, UsageError
from mambify.evaluate import read_blocks
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


def test_files_of_rows_are_read_as_documents(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    rows = [{"text": "All happy families are alike."}, {"messages": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        source = tmp_path / name
        documents = read_documents(source, tokenizer, split="all")
        blocks = read_material(tokenizer, texts=[source], context_length=512).texts[str(source)]
        assert [block.tolist() for block in blocks] == [document.input_ids.tolist() for document in documents]
        assert "{" not in tokenizer.decode(blocks[0])
        with pytest.raises(UsageError, match="holds rows and not one text"):
            read_blocks(source, tokenizer, context_length=512)
    few = read_material(tokenizer, texts=[tmp_path / "rows.json"], context_length=8, max_tokens=9)
    assert len(few.texts[str(tmp_path / "rows.json")]) == 2
    (tmp_path / "rows.jsonl").write_text('{"body": "no text"}')
    with pytest.raises(UsageError, match="line 1: no usable field"):
        read_material(tokenizer, texts=[tmp_path / "rows.jsonl"])


def test_blocks_longer_than_the_positions(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    material = read_material(tokenizer, texts=[text], context_length=257)
    with pytest.raises(InvalidOptionError, match="the teacher knows: give a context length of at most 256"):
        evaluate(llama(len(tokenizer), max_position_embeddings=512), model, material, context_length=257)


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
