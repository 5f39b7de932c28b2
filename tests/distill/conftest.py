"""A teacher of a few thousand parameters on disk, text to train on, and a recipe over both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mambify.distill.recipe import Recipe, parse_recipe
from tiny import byte_tokenizer, llama

NUM_LAYERS = 4
CONTEXT = 32


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(62))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    model = llama(len(words), num_hidden_layers=NUM_LAYERS, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    generator = torch.Generator().manual_seed(1)
    rows = [" ".join(f"w{i}" for i in torch.randint(0, 62, (40,), generator=generator).tolist()) for _ in range(120)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chat-teacher")
    tokenizer = byte_tokenizer()
    llama(len(tokenizer), num_hidden_layers=NUM_LAYERS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers, every tenth of them with a second exchange."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = []
    for i in range(60):
        turns = [f"How are you, {i}?", f"I am well, number {i}.", "And the weather?", "The weather is good."]
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": words} for role, words in zip(roles, turns, strict=True)]
        rows.append({"messages": messages if i % 10 == 0 else messages[:2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which the better answer says fox and the worse one says dog; two of them of no use."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Say it, {i}", "chosen": f"fox {i}", "rejected": f"lazy dog {i}"} for i in range(24)]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": " "}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_chat_recipe(make_recipe: Callable[..., Recipe], chat_teacher: Path, chat_file: Path) -> Callable[..., Recipe]:
    """As ``make_recipe``, with the teacher that chats and conversations as text, in blocks of 64."""

    def make(**changes: Any) -> Recipe:
        data = {"train": str(chat_file), "context_length": 64}
        return make_recipe(**{"teacher": str(chat_teacher), "data": data} | changes)

    return make


@pytest.fixture
def make_recipe(teacher_directory: Path, text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``make_recipe(stages=[…], **keys)``: eight steps of align and eight of kd unless told otherwise."""

    def make(**changes: Any) -> Recipe:
        stage = {"tokens": 8 * 4 * CONTEXT, "batch_tokens": 4 * CONTEXT}
        base: dict[str, Any] = {
            "teacher": str(teacher_directory),
            "student": {"mixer": "mamba2", "attention": 0.5},
            "data": {"train": str(text_file), "context_length": CONTEXT},
            "stages": [{"kind": "align", **stage}, {"kind": "kd", **stage}],
            "output": str(tmp_path / "run"),
            "precision": "float32",
            "log_every": 1,
            "checkpoint_every": 3,
            "report_to": [],
        }
        return parse_recipe(base | changes)

    return make
