from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mambify.errors import InvalidOptionError, TokenizerMismatchError, UnknownSourceError, UsageError
from mambify.evaluate import (
    compare,
    comparison_table,
    cut_into_blocks,
    evaluate_language_model,
    preference_accuracy,
    preference_table,
    read_blocks,
)
from mambify.evaluate.preferences import as_json
from mambify.evaluate.tasks import task_table
from mambify.evaluate.tasks.compare import _figures
from mambify.tokenization import tokenizer_fingerprint


def make_tokenizer(num_words: int = 30) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(num_words))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


TOKENIZER = make_tokenizer()
STUDENT, TEACHER = make_model(0), make_model(1)


def synthesized(path: Path, rows: list[list[int]], **changes: object) -> Path:
    """A directory as `mambify synthesize` writes it, the parts that evaluation reads."""
    path.mkdir()
    text = "".join(json.dumps({"input_ids": row, "text": "a\u2028b"}, ensure_ascii=False) + "\n" for row in rows)
    (path / "heldout-00000.jsonl").write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = [
        {"name": "train-00000.jsonl", "split": "train", "sha256": "-"},
        {"name": "heldout-00000.jsonl", "split": "heldout", "sha256": digest},
    ]
    manifest = {
        "complete": True,
        "tokenizer": tokenizer_fingerprint(TOKENIZER),
        "shards": [{"files": files}],
    } | changes
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_texts_are_cut_without_overlap_and_lose_no_predicted_token() -> None:
    blocks = cut_into_blocks([range(10), range(20, 25), [7], []], 4)
    assert [block.tolist() for block in blocks] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [20, 21, 22, 23],
    ]  # fmt: skip
    assert len(cut_into_blocks([range(100)], 4, max_tokens=9)) == 3
    with pytest.raises(InvalidOptionError, match="at least 2"):
        cut_into_blocks([range(9)], 1)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_bytes(b"\xef\xbb\xbfw1 w2\r\n\r\nw3 w4 w5")
    blocks = read_blocks(tmp_path / "text.md", TOKENIZER, context_length=3)
    assert [block.tolist() for block in blocks] == [[4, 5, 6], [7, 8]]


def test_compare_gives_json_with_both_models_on_every_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11")
    rows = [[1, 5, 6, 7, 8], [1, 9, 8, 7], [1, 20, 21, 22, 23, 24, 25]]
    directory = synthesized(tmp_path / "data", rows)
    seen = []
    result = compare(
        STUDENT,
        TEACHER,
        {"held out": directory, "file": str(tmp_path / "text.txt"), "given": torch.tensor([[3, 4, 5]])},
        tokenizer=TOKENIZER,
        teacher_tokenizer=make_tokenizer(),
        context_length=5,
        progress=lambda name, done, total: seen.append((name, done, total)),
    )
    assert json.loads(json.dumps(result)) == result
    assert list(result["sources"]) == ["held out", "file", "given"]
    assert seen == [("held out", 4, 4), ("file", 2, 2), ("given", 1, 1)]
    held = result["sources"]["held out"]
    score = evaluate_language_model(STUDENT, cut_into_blocks(rows, 5), teacher=TEACHER)
    assert score.kl is not None
    assert score.teacher_perplexity is not None
    assert held["student"]["perplexity"] == score.perplexity.value
    assert held["student"]["kl"] == score.kl.value
    assert held["student"]["kl_interval"] == [score.kl.low, score.kl.high]
    assert held["teacher"]["perplexity"] == score.teacher_perplexity.value
    assert 0 <= held["student"]["top1_agreement"] <= 1
    assert (held["num_blocks"], held["num_tokens"]) == (4, score.num_tokens)
    assert set(held["teacher"]) == {"perplexity", "perplexity_interval", "nll", "nll_interval"}


def shown(result: dict[str, object]) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(comparison_table(result, title="How much was kept"))
    return out.getvalue()


def test_the_table_shows_every_figure() -> None:
    blocks = torch.randint(0, 33, (8, 12), generator=torch.Generator().manual_seed(0))
    result = compare(STUDENT, TEACHER, {"a text": blocks})
    text = shown(result)
    figures = result["sources"]["a text"]
    assert "How much was kept" in text
    assert "a text" in text
    for value in (f"{figures['student']['kl']:.4f}", f"{figures['teacher']['perplexity']:.2f}", "88"):
        assert value in text
    alone = shown(compare(STUDENT, None, {"a text": blocks}))
    assert f"{figures['student']['perplexity']:.2f}" in alone
    assert "KL" in text
    assert "KL" not in alone
    assert "teacher" not in alone


def test_a_single_block_has_no_interval() -> None:
    result = compare(STUDENT, TEACHER, {"a text": torch.tensor([[3, 4, 5, 6]])})
    figures = result["sources"]["a text"]["student"]
    assert set(figures) == {"perplexity", "nll", "perplexity_ratio", "kl", "top1_agreement"}
    assert f"{figures['perplexity']:.2f}" in shown(result)
    assert "(" not in shown(result)
    assert "(" in shown(compare(STUDENT, TEACHER, {"a text": torch.tensor([[3, 4, 5, 6], [4, 5, 6, 7]])}))


def test_a_single_pair_or_question_has_no_interval() -> None:
    pair = {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([-100, 4])}
    flat = as_json(preference_accuracy(STUDENT, None, [(pair, pair)]))
    assert flat == {"num_pairs": 1, "accuracy": 0.5, "accuracy_per_token": 0.5}
    table = io.StringIO()
    Console(file=table, width=140).print(preference_table({"pairs": flat}))
    assert "50.0%" in table.getvalue()
    assert "50.0% (" not in table.getvalue()
    tasks = {
        role: {"one": {"acc": np.ones(1)}, "two": {"acc": np.array([0.0, 1.0])}} for role in ("teacher", "student")
    }
    results, means = _figures(tasks, resamples=50, seed=0)
    assert results["one"]["metrics"]["acc"] == {"teacher": 1.0, "student": 1.0, "difference": 0.0}
    assert results["two"]["metrics"]["acc"]["difference_interval"] == [0.0, 0.0]
    assert means["acc"] == {"tasks": {"one": "acc", "two": "acc"}, "teacher": 0.75, "student": 0.75, "difference": 0.0}
    table = io.StringIO()
    Console(file=table, width=140).print(task_table({"tasks": results, "means": means}))
    assert "100.0 " in table.getvalue()
    assert "100.0 (" not in table.getvalue()


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        compare(STUDENT, TEACHER, {})
    with pytest.raises(TokenizerMismatchError, match="33 tokens against 34"):
        compare(
            STUDENT, TEACHER, {"a": [[1, 2]]},
            tokenizer=make_tokenizer(31), teacher_tokenizer=TOKENIZER,
        )  # fmt: skip
    with pytest.raises(UnknownSourceError, match="no text at"):
        compare(STUDENT, TEACHER, {"a": tmp_path / "absent"}, tokenizer=TOKENIZER)
    (tmp_path / "text.txt").write_text("w1")
    with pytest.raises(UsageError, match="no tokenizer"):
        compare(STUDENT, TEACHER, {"a": tmp_path / "text.txt"})
    with pytest.raises(UsageError, match="holds no text"):
        read_blocks(tmp_path / "text.txt", TOKENIZER, context_length=8)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_blocks(tmp_path / "text.txt", TOKENIZER, context_length=8)


def test_a_synthesized_directory_is_checked(tmp_path: Path) -> None:
    rows = [[1, 2, 3]]
    with pytest.raises(UsageError, match="not a synthesized directory"):
        read_blocks(tmp_path, TOKENIZER, context_length=8)
    unfinished = synthesized(tmp_path / "unfinished", rows, complete=False)
    with pytest.raises(UsageError, match="unfinished"):
        read_blocks(unfinished, TOKENIZER, context_length=8)
    other = synthesized(tmp_path / "other", rows, tokenizer="abc")
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        read_blocks(other, TOKENIZER, context_length=8)
    altered = synthesized(tmp_path / "altered", rows)
    (altered / "heldout-00000.jsonl").write_text('{"input_ids": [1, 2, 4]}\n')
    with pytest.raises(UsageError, match="was altered"):
        read_blocks(altered, TOKENIZER, context_length=8)
    (altered / "heldout-00000.jsonl").unlink()
    with pytest.raises(UsageError, match="is missing"):
        read_blocks(altered, TOKENIZER, context_length=8)
