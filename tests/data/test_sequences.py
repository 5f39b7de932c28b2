"""Sequences that a model writes: as many as asked for, the same for a seed, and labels on answers to given prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mambify
from mambify.data.documents import Document, document_id
from mambify.data.sequences import SequenceWriter, prompts_of
from mambify.errors import UsageError
from mambify.model import HybridForCausalLM
from tiny import byte_tokenizer, llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    path = tmp_path_factory.mktemp("model")
    llama(len(byte_tokenizer())).save_pretrained(path)
    return mambify.load(path).model


@pytest.mark.parametrize("kind", ["auto", "text", "mixed"])
def test_as_many_as_asked_for_and_the_same_for_a_seed(model: HybridForCausalLM, kind: str) -> None:
    writer = SequenceWriter(byte_tokenizer(), 32, kind=kind, max_new_tokens=40, batch_size=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (writer.write(model, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one["input_ids"].shape == one["labels"].shape == (7, 32)
    assert torch.equal(one["input_ids"], same["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["input_ids"], one["labels"])


def test_answers_to_prompts_are_what_is_learned(model: HybridForCausalLM) -> None:
    prompts = [[1, 50, 60], [1, 70, 80, 90]]
    writer = SequenceWriter(byte_tokenizer(), 32, prompts=prompts, max_new_tokens=10, batch_size=4)
    written = writer.write(model, 4, seed=0)
    hidden = written["labels"] == -100
    assert hidden.any() and not hidden.all()
    ids, marks = written["input_ids"].flatten().tolist(), hidden.flatten().tolist()
    runs = "".join("p" if mark else "a" for mark in marks).split("a")
    lengths = {len(run) for run in runs[1:-1] if run}
    assert lengths <= {3, 4}
    start = marks.index(False, marks.index(True))
    assert ids[:start][-3:] == prompts[0] or ids[:start][-4:] == prompts[1]


def test_prompts_are_questions_and_beginnings() -> None:
    chat = Document("0" * 32, "chat", "", torch.arange(20).numpy(), loss_start=8)
    long = Document("1" * 32, "chat", "", torch.arange(90).numpy(), loss_start=60)
    text = Document(document_id("a"), "text", "a", torch.arange(100, 140).numpy())
    assert prompts_of([chat, long, text], longest=32) == [list(range(8)), list(range(100, 120))]
    with pytest.raises(UsageError, match="no prompt of at most 32"):
        prompts_of([long], longest=32)


def test_a_synthesized_conversation_of_several_answers_keeps_their_places(
    model: HybridForCausalLM, tmp_path: Path
) -> None:
    """Written, and read again: each answer in its place, and a document of one answer without the extra field."""
    from mambify.data import read_documents, synthesize

    tokenizer = byte_tokenizer()
    options = {"num_tokens": 600, "max_new_tokens": 12, "max_user_tokens": 8, "batch_size": 4, "temperature": 3.0}
    synthesize(model, tokenizer, tmp_path / "data", turns=2, heldout=0.0, **options)  # type: ignore[arg-type]
    documents = read_documents(tmp_path / "data", tokenizer, split="all")
    for document in documents:
        for start, end in document.answer_spans:
            opening = tokenizer.decode(document.input_ids[:start])
            assert start == end or opening.endswith("<|im_start|>assistant\n")
    assert all("answers" not in document.to_json() for document in documents if not document.answers)
