"""The text of an experiment: what is given, or sampled from the teacher once and kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from mambify.data.chat import has_chat_template
from mambify.data.manifest import Manifest, is_synthesized
from mambify.data.synthesize import synthesize
from mambify.distill.arguments import use_bfloat16
from mambify.experiments.jobs import Say
from mambify.experiments.request import Request
from mambify.families.load import load, load_tokenizer, require_tokenizer

_LEAST, _MOST = 200_000, 30_000_000  # tokens of each kind
_HELDOUT = 0.05
#: kind of text → how it is sampled: conversations as people would have them, plain text from the whole distribution
_KINDS: dict[str, dict[str, Any]] = {"chat": {"top_k": 50}, "text": {"max_new_tokens": 512}}


def with_texts(request: Request, *, device: str, say: Say) -> Request:
    """``request`` with text to train on: its own, or conversations and plain text that the teacher samples.

    Of each kind there are half as many tokens as the largest budget, at least 200 k and at most 30 M. A teacher without
    a chat template gives plain text only.

    Raises:
        UsageError: see :func:`mambify.families.load.load` and :func:`mambify.data.synthesize.synthesize`.
    """
    if request.data:
        return request
    count = min(max(max(request.tokens) // 2, _LEAST), _MOST)
    tokenizer = load_tokenizer(request.teacher)
    kinds = [kind for kind in _KINDS if kind == "text" or (tokenizer is not None and has_chat_template(tokenizer))]
    home = request.out / "data" / re.sub(r"[^\w.-]+", "-", request.teacher).strip("-")
    folders = {kind: home / f"{kind}-{count}-{request.seed}" for kind in kinds}
    missing = [kind for kind, folder in folders.items() if not _is_complete(folder)]
    if missing:
        say(f"loading {request.teacher}")
        loaded = load(request.teacher, device=device, dtype="bfloat16" if use_bfloat16("auto", device) else "auto")
        batch_size = 1024 if device.startswith("cuda") else 64
        for kind in missing:
            say(f"sampling {count:,} tokens of {kind} into {folders[kind]}")
            synthesize(
                loaded.model,
                require_tokenizer(loaded),
                folders[kind],
                num_tokens=count,
                kind=kind,
                seed=request.seed,
                batch_size=batch_size,
                documents_per_shard=16 * batch_size if device.startswith("cuda") else 512,
                heldout=_HELDOUT,
                teacher=request.teacher,
                **_KINDS[kind],
            )
        del loaded
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return request.with_data(tuple(str(folder) for folder in folders.values()))


def _is_complete(folder: Path) -> bool:
    return is_synthesized(folder) and Manifest.read(folder).complete
