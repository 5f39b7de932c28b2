"""In a process that cannot import mambify, stock transformers gives the same greedy text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import mambify
from mambify import HybridForCausalLM
from mambify.errors import MissingDependencyError
from mambify.export import export_transformers
from mambify.families.load import LoadedModel
from tiny import byte_tokenizer

from .conftest import A, Hybrid, M, needs_stock_group_norm

pytestmark = needs_stock_group_norm

PROMPTS = [
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "How do I boil an egg?",
    "Name three colours of the rainbow.",
    "What is 12 + 30?",
    "Explain why the sky is blue.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a tip for better sleep.",
    "What do bees make?",
    "Tell me a short story about a fox.",
    "What is a prime number?",
    "List two uses of iron.",
    "How many days has a week?",
    "What is the opposite of cold?",
    "Why do leaves fall in autumn?",
    "Write a polite reply to an invitation.",
    "What is the largest planet?",
    "How does a bicycle stay upright?",
    "Give a synonym of 'quick'.",
]


def answers_of_a_clean_process(directory: Path, job: dict[str, Any], scratch: Path) -> list[list[int]]:
    """Token ids of the answers that stock transformers gives in a process without mambify."""
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    program = Path(__file__).with_name("clean_process.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(program), str(directory), str(file)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["blocked"]
    assert result["class"] == "GraniteMoeHybridForCausalLM"
    answers: list[list[int]] = result["answers"]
    return answers


def answers_of_ours(
    model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, job: dict[str, Any]
) -> list[list[int]]:
    answers = []
    for prompt in job["prompts"]:
        if job["chat"]:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=job["max_new_tokens"])
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("chat", [True, False])
def test_tiny(chat: bool, tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_hybrid([M, A], vocab_size=len(tokenizer))
    export_transformers(model, tmp_path / "stock", tokenizer=tokenizer)
    job = {"prompts": ["How are you?", "The weather"], "max_new_tokens": 16, "chat": chat}
    theirs = answers_of_a_clean_process(tmp_path / "stock", job, tmp_path)
    assert theirs == answers_of_ours(model, tokenizer, job)
    assert len(set(theirs[0])) > 2


@pytest.fixture
def distilled() -> LoadedModel:
    try:
        return mambify.load("smollm2-hybrid")
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_twenty_prompts_of_a_distilled_half(distilled: LoadedModel, tmp_path: Path) -> None:
    assert distilled.tokenizer is not None
    model = distilled.model.float()
    export_transformers(model, tmp_path / "stock", tokenizer=distilled.tokenizer)
    job = {"prompts": PROMPTS, "max_new_tokens": 48, "chat": True}
    theirs = answers_of_a_clean_process(tmp_path / "stock", job, tmp_path)
    assert theirs == answers_of_ours(model, distilled.tokenizer, job)


@pytest.mark.slow
def test_twenty_prompts_at_one_quarter(smollm2: LoadedModel, tmp_path: Path) -> None:
    """Not trained: what it says is no text, and rounding may turn a token where two are almost as likely."""
    assert smollm2.tokenizer is not None
    torch.manual_seed(0)
    student = mambify.convert(smollm2.model, attention=0.25)
    export_transformers(student, tmp_path / "stock", tokenizer=smollm2.tokenizer)
    job = {"prompts": PROMPTS, "max_new_tokens": 12, "chat": True}
    theirs = answers_of_a_clean_process(tmp_path / "stock", job, tmp_path)
    ours = answers_of_ours(student, smollm2.tokenizer, job)
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 18
