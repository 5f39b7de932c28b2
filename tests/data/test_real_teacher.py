"""The real teacher: its template, its plain text, and its own surprise at what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mambify.data import check_disjoint, pack, read_documents, synthesize
from mambify.data.chat import chat_format, document_end, document_start, encode_conversation

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel


def test_smollm2_writes_both_sides_of_a_conversation_and_plain_text(smollm2: LoadedModel, tmp_path: Path) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    assert tokenizer is not None
    form = chat_format(tokenizer)
    assert tokenizer.decode(form.before_user).endswith("<|im_end|>\n<|im_start|>user\n")
    assert tokenizer.decode(form.before_answer) == "<|im_end|>\n<|im_start|>assistant\n"
    assert (form.user_end, document_start(tokenizer), document_end(tokenizer)) == (2, 0, 0)

    out = tmp_path / "data"
    settings = {"num_tokens": 2500, "kind": "mixed", "batch_size": 16, "max_new_tokens": 48, "heldout": 0.25}
    manifest = synthesize(model, tokenizer, out, **settings)
    assert manifest.complete
    train, held = (read_documents(out, tokenizer, split=split) for split in ("train", "heldout"))
    check_disjoint(train, held)
    assert len(pack(train, 128, seed=0)) > 5
    surplus = []
    for document in [d for d in train if len(d) > d.loss_start]:
        ids = torch.tensor(document.input_ids.tolist())
        with torch.inference_mode():
            logp = model(input_ids=ids[None]).logits[0, document.loss_start - 1 : -1].log_softmax(-1)
        said = ids[document.loss_start :, None]
        surplus.append(-logp.gather(1, said)[:, 0] + (logp.exp() * logp).sum(-1))
    values = torch.cat(surplus)
    assert len(values) > 500
    assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5


def test_smollm2_answers_what_it_is_asked(smollm2: LoadedModel, tmp_path: Path) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    assert tokenizer is not None
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"turns": ["Say hello.", "And goodbye."]}\n"What is the capital of France?"\n')
    out = tmp_path / "data"
    synthesize(model, tokenizer, out, prompts=questions, num_tokens=700, batch_size=8, max_new_tokens=40, heldout=0.0)
    found = read_documents(out, tokenizer)
    assert all(document.messages is not None for document in found)
    paris = [d for d in found if d.messages and "France" in d.messages[0]["content"]]
    assert any("Paris" in d.text for d in paris)
    longest = max(found, key=lambda document: len(document.messages or ()))
    assert [message["role"] for message in longest.messages or ()] == ["user", "assistant"] * 2
    # Every token where the template puts it: a whole conversation, encoded anew, is the same one.
    whole = [d for d in found if d.input_ids[-1] == tokenizer.eos_token_id]
    assert whole
    for document in whole:
        again = encode_conversation(tokenizer, document.messages or ())
        ids = [document.input_ids.tolist()[start:end] for start, end in document.answer_spans]
        assert [again.input_ids[start:end] for start, end in again.answers] == ids
        assert again.text == document.text
