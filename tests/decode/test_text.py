from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mambify.config import HybridConfig
from mambify.decode import (
    Conversation,
    Detokenizer,
    encode_prompt,
    generate,
    stop_ids,
    stream,
)
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.model import HybridForCausalLM

TEXT = "How naïve: 東京 is 🙂🙂 great, isn't it?\n\n  Übergrößen!  Two  spaces."
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def bytewise() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["How great is it? How are you? " * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def wordwise() -> PreTrainedTokenizerFast:
    """Words that carry their space in front, and lose it at the beginning of what is decoded (SentencePiece)."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["How great is it? How are you? " * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=[bytewise, wordwise], ids=["bytewise", "wordwise"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def test_pieces_together_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_pieces_of_any_tokens_are_their_text() -> None:
    """Broken characters, special tokens in the middle: whatever a model may draw."""
    tokenizer = bytewise()
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 12))]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_no_piece_holds_half_a_character() -> None:
    tokenizer = bytewise()
    pieces = pieces_of(tokenizer, tokenizer.encode("a🙂b", add_special_tokens=False))
    assert "🙂" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = bytewise()
    pieces = pieces_of(tokenizer, tokenizer.encode("How are you?", add_special_tokens=False))
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_a_prompt_is_encoded_as_it_stands_and_messages_through_the_template() -> None:
    tokenizer = bytewise()
    assert tokenizer.decode(encode_prompt(tokenizer, "How are you?")) == "How are you?"
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "<s>user:hi</s><s>assistant:"


def test_messages_that_cannot_be_written_are_refused() -> None:
    tokenizer = bytewise()
    with pytest.raises(UnsupportedError, match="refuses these messages: no tools here"):
        encode_prompt(tokenizer, [{"role": "tool", "content": "hi"}])
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidOptionError, match="empty"):
        encode_prompt(tokenizer, "")


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    config = HybridConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, layer_mixers=["mamba2", "attention"], eos_token_id=7,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HybridForCausalLM(config).eval()


class TestStream:
    def test_it_is_the_text_of_what_generate_gives(self, model: HybridForCausalLM) -> None:
        tokenizer = bytewise()
        prompt = encode_prompt(tokenizer, "How are you?")
        stops = sorted(stop_ids(model, tokenizer))
        assert stops == [1, 7]  # the tokenizer's and the model's
        for settings in ({}, {"temperature": 1.0, "seed": 3}):
            ids = generate(model, torch.tensor([prompt]), max_new_tokens=30, eos_token_id=stops, **settings)[0]
            text = "".join(stream(model, tokenizer, "How are you?", max_new_tokens=30, **settings))
            assert text == tokenizer.decode([t for t in ids[len(prompt) :].tolist() if t not in stops])
            assert text

    def test_it_ends_at_an_end_token(self, model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = bytewise()
        prompt = encode_prompt(tokenizer, "How are you?")
        whole = stream(model, tokenizer, prompt, max_new_tokens=10)
        list(whole)
        assert (whole.num_tokens, whole.ended) == (10, False)
        stop = int(generate(model, torch.tensor([prompt]), max_new_tokens=4, eos_token_id=[])[0, -1])
        monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
        ended = stream(model, tokenizer, prompt, max_new_tokens=10)
        list(ended)
        assert ended.ended
        assert ended.num_tokens <= 4

    def test_it_comes_while_it_is_being_made(self, model: HybridForCausalLM) -> None:
        pieces = stream(model, bytewise(), [5, 6], max_new_tokens=20)
        next(pieces)
        assert pieces.num_tokens < 20

    def test_a_setting_out_of_range_is_known_at_once(self, model: HybridForCausalLM) -> None:
        with pytest.raises(InvalidOptionError, match="top_p"):
            stream(model, bytewise(), "hi", top_p=2.0)


class TestConversation:
    def test_it_remembers(self) -> None:
        tokenizer = bytewise()
        conversation = Conversation(tokenizer, system="be kind", max_prompt_tokens=1000)
        conversation.ask("hi")
        conversation.answer("hello")
        ids, num_dropped = conversation.ask("how?")
        assert num_dropped == 0
        assert tokenizer.decode(ids) == (
            "<s>system:be kind</s><s>user:hi</s><s>assistant:hello</s><s>user:how?</s><s>assistant:"
        )

    def test_the_oldest_exchanges_are_forgotten_first(self) -> None:
        tokenizer = bytewise()
        conversation = Conversation(tokenizer, system="be kind", max_prompt_tokens=110)
        for number in range(3):
            conversation.ask(f"question {number}")
            conversation.answer(f"answer {number}")
        ids, num_dropped = conversation.ask("a question that is somewhat longer")
        assert num_dropped >= 1
        assert len(ids) <= 110
        roles = [message["role"] for message in conversation.messages]
        assert roles == ["system", *["user", "assistant"] * ((len(roles) - 2) // 2), "user"]
        assert conversation.messages[-2]["content"] == "answer 2"

    def test_a_turn_that_never_fits_changes_nothing(self) -> None:
        conversation = Conversation(bytewise(), max_prompt_tokens=40)
        conversation.ask("hi")
        conversation.answer("hello")
        before = conversation.messages
        with pytest.raises(InvalidOptionError, match="the model reads 40"):
            conversation.ask("far too long " * 20)
        assert conversation.messages == before

    def test_reset_keeps_the_system_message(self) -> None:
        conversation = Conversation(bytewise(), system="be kind", max_prompt_tokens=100)
        conversation.ask("hi")
        conversation.reset()
        assert conversation.messages == [{"role": "system", "content": "be kind"}]
