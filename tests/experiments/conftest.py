"""A teacher of a few thousand parameters, text that it sampled, and files to tune on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambify.data.synthesize import synthesize
from mambify.experiments.request import Request
from mambify.families.load import load
from tiny import byte_tokenizer, llama

CONTEXT, BATCH = 32, 64


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``teacher/``, ``chat/`` and ``text/`` (synthesized), and jsonl files: ``talk``, ``pairs``, ``other-pairs``."""
    path = tmp_path_factory.mktemp("experiments")
    tokenizer = byte_tokenizer()
    llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(path / "teacher")
    tokenizer.save_pretrained(path / "teacher")
    loaded = load(path / "teacher")
    for kind in ("chat", "text"):
        synthesize(
            loaded.model,
            tokenizer,
            path / kind,
            num_tokens=6000,
            kind=kind,
            max_new_tokens=40,
            max_user_tokens=20,
            heldout=0.1,
        )
    files: dict[str, list[dict[str, str]]] = {
        "talk": [{"prompt": f"Say {i}", "response": f"the quick fox {i} and the dog"} for i in range(40)],
        "pairs": [{"prompt": f"Tell {i}", "chosen": f"fox {i}", "rejected": f"lazy dog {i}"} for i in range(20)],
        "other-pairs": [{"prompt": f"Ask {i}", "chosen": f"fox {i}", "rejected": f"lazy dog {i}"} for i in range(6)],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return path


@pytest.fixture
def options(home: Path, tmp_path: Path) -> dict[str, Any]:
    """What every experiment is asked here: a few steps on a tiny teacher."""
    return {
        "teacher": str(home / "teacher"),
        "data": (str(home / "chat"),),
        "out": tmp_path / "out",
        "tokens": (10 * BATCH,),
        "batch_tokens": BATCH,
        "context_length": CONTEXT,
        "max_tokens": 256,
    }


@pytest.fixture
def request_of(options: dict[str, Any]) -> Callable[..., Request]:
    def make(**changes: Any) -> Request:
        return Request(**{"recipes": ("best",)} | options | changes)

    return make


@pytest.fixture
def flags(home: Path, tmp_path: Path) -> list[str]:
    """The same for the command line, without tokens."""
    values = {
        "teacher": home / "teacher",
        "data": home / "chat",
        "out": tmp_path / "out",
        "batch-tokens": BATCH,
        "context-length": CONTEXT,
        "max-tokens": 256,
        "device": "cpu",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
