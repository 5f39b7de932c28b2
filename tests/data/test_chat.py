from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from mambify.data.chat import (
    chat_format,
    document_end,
    document_start,
    encode_conversation,
    encode_text,
    render,
)
from mambify.errors import TokenizerMismatchError, UnsupportedError
from mambify.tokenization import require_same_tokenizer, tokenizer_fingerprint

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

ZEPHYR = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|endoftext|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'w1 ' + m['content'] + ' w2' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def test_chatml_is_taken_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    form = chat_format(tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    opening = ["<|im_start|>", "system", "w1", "w2", "<|im_end|>", "<|im_start|>", "user"]
    assert list(form.before_user) == ids(opening)
    assert list(form.before_answer) == ids(["<|im_end|>", "<|im_start|>", "assistant"])
    assert list(form.before_next_user) == ids(["<|im_end|>", "<|im_start|>", "user"])
    assert (form.user_end, form.answer_end) == (2, 2)


def test_another_template_has_other_turn_ends(new_tokenizer: MakeTokenizer) -> None:
    form = chat_format(new_tokenizer(template=ZEPHYR))
    assert (form.user_end, form.answer_end) == (0, 0)
    assert len(form.before_user) == 2


def test_the_pieces_make_up_the_rendered_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    form = chat_format(tokenizer)
    turns = ["w3 w4", "w5", "w6 w7 w8", "w9"]
    said = [encode_text(tokenizer, words) for words in turns]
    pieces = [*form.before_user, *said[0], *form.before_answer, *said[1]]
    pieces += [*form.before_next_user, *said[2], *form.before_answer, *said[3], form.answer_end]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": words} for role, words in zip(roles, turns, strict=True)]
    assert pieces == encode_text(tokenizer, render(tokenizer, messages))


@pytest.mark.parametrize("template", [None, "", BRACKETS, "{{ 'w1' }}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_be_used_is_refused(template: str | None, new_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UnsupportedError):
        chat_format(new_tokenizer(template=template))


def test_documents_begin_and_end_where_the_tokenizer_says(new_tokenizer: MakeTokenizer) -> None:
    chatml = new_tokenizer()  # like SmolLM2: bos opens a chat turn, so it does not begin a document
    assert (document_start(chatml), document_end(chatml)) == (0, 0)

    class AddsBos:  # like Llama and Mistral
        bos_token_id, eos_token_id = 1, 2

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1, 9] if add_special_tokens else [9]

        def get_vocab(self) -> dict[str, int]:
            return {"<|endoftext|>": 0}

    assert (document_start(AddsBos()), document_end(AddsBos())) == (1, 2)  # type: ignore[arg-type]


def test_an_encoded_conversation_knows_where_its_answer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
    ids, ((loss_start, end),), text = encode_conversation(tokenizer, messages)
    assert end == len(ids)
    assert tokenizer.convert_ids_to_tokens(ids[loss_start:]) == ["w5", "w6", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(ids[:loss_start])[-2:] == ["<|im_start|>", "assistant"]
    assert text.endswith("w5 w6<|im_end|>")
    with pytest.raises(UnsupportedError, match="assistant"):
        encode_conversation(tokenizer, messages[:1])


def test_a_fingerprint_tells_vocabularies_apart_and_nothing_else(new_tokenizer: MakeTokenizer) -> None:
    one, same, other = new_tokenizer(), new_tokenizer(template=None), new_tokenizer(num_words=41)
    same.pad_token, same.padding_side = "<|endoftext|>", "left"
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same)
    require_same_tokenizer(one, same)
    with pytest.raises(TokenizerMismatchError, match="47 tokens against 48"):
        require_same_tokenizer(one, other)
    moved = new_tokenizer()
    moved.eos_token = "<|endoftext|>"
    with pytest.raises(TokenizerMismatchError, match="begin/end"):
        require_same_tokenizer(one, moved)
