"""A tokenizer as GGUF carries it: tokens with their types, merges, and which way of cutting words llama.cpp shall use.

llama.cpp knows pre-tokenizers by name. Which one ours is, is read off its own definition, not guessed from the
vocabulary: a tokenizer that was trained yesterday is carried as well as a famous one, and one whose way of cutting
llama.cpp lacks is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from mambify.errors import UnsupportedError
from mambify.families.pretokenizers import EXPRESSIONS

if TYPE_CHECKING:
    from gguf import GGUFWriter

# GGUF's token types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

#: the regular expression that a byte-level tokenizer cuts text with → llama.cpp's name of it
_BY_EXPRESSION = {expression: name for name, expression in EXPRESSIONS.items()}
#: pre-tokenizers under which llama.cpp takes a word that is a token before it looks at merges
_IGNORES_MERGES = ("llama-bpe",)


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level byte pairs, ``llama`` for SentencePiece's byte pairs.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: by id; of the size of the embedding.
        types: GGUF's token type, one a token.
        merges: byte-level only.
        scores: ``llama`` only: the higher, the earlier two pieces are joined to this token.
        space_prefix: ``llama`` only: whether a space is put before the text.
        bos, eos, unk, pad: ids of the special tokens, where there are any.
        add_bos, add_eos: whether the tokenizer adds them to a text by itself.
        chat_template: Jinja, where there is one.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    space_prefix: bool
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Adds ``tokenizer.*`` to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for token_id, add in (
            (self.bos, writer.add_bos_token_id),
            (self.eos, writer.add_eos_token_id),
            (self.unk, writer.add_unk_token_id),
            (self.pad, writer.add_pad_token_id),
        ):
            if token_id is not None:
                add(token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Vocabulary:
    """Reads what GGUF needs off ``tokenizer``, for an embedding of ``vocab_size`` rows.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer that gives the same ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} is written in Python, without a tokenizer.json")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, and llama.cpp reads byte pairs (BPE) here")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal("its byte pairs have a dropout, a prefix or a suffix")
    added = {token["id"]: token for token in definition["added_tokens"]}
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    if max(texts) >= vocab_size:
        raise _refusal(f"it has the token {max(texts)}, and the model {vocab_size} rows for tokens")
    byte_level = not model["byte_fallback"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    pre = _byte_level_name(definition) if byte_level else "default"
    if byte_level and bool(model.get("ignore_merges")) != (pre in _IGNORES_MERGES):
        raise _refusal(f"it treats whole words (ignore_merges) otherwise than '{pre}' of llama.cpp does")
    one, two = (tokenizer(text).input_ids for text in ("a", "b"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=[texts.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)],
        types=[_type(token_id, texts, added, model, byte_level) for token_id in range(vocab_size)],
        merges=[f"{left} {right}" for left, right in merges] if byte_level else [],
        scores=[] if byte_level else _scores(merges, texts, vocab_size),
        space_prefix=False if byte_level else _adds_space(definition),
        bos=bos,
        eos=eos,
        unk=tokenizer.unk_token_id,
        pad=tokenizer.pad_token_id,
        add_bos=bos is not None and one[0] == two[0] == bos,
        add_eos=eos is not None and one[-1] == two[-1] == eos,
        chat_template=_template(tokenizer),
    )


def _refusal(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"GGUF cannot carry this tokenizer: {reason}. Export with --format transformers, which keeps it as it is"
    )


def _type(
    token_id: int,
    texts: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    model: Mapping[str, Any],
    byte_level: bool,
) -> int:
    if token_id not in texts:
        return _UNUSED
    if not byte_level and texts[token_id] == model.get("unk_token"):
        return _UNKNOWN
    if token_id in added:
        return _CONTROL if added[token_id]["special"] else _USER_DEFINED
    if not byte_level and len(texts[token_id]) == 6 and texts[token_id].startswith("<0x"):
        return _BYTE
    return _NORMAL


def _steps(part: Mapping[str, Any] | None, of: str) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer or normaliser, and what a sequence of them holds, one by one."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[of]:
            yield from _steps(step, of)
    else:
        yield part


def _byte_level_name(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words."""
    normalisers = [step["type"] for step in _steps(definition["normalizer"], "normalizers")]
    if normalisers not in ([], ["NFC"]):  # composed characters are what people type; llama.cpp leaves text as it is
        raise _refusal(f"it changes text before it reads it ({', '.join(normalisers)}), which llama.cpp does not")
    steps = list(_steps(definition["pre_tokenizer"], "pretokenizers"))
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _refusal(f"its pre-tokenizer ({', '.join(kinds) or 'none'}) does not end in ByteLevel without a prefix")
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        cut = steps[0]
        expression = cut["pattern"].get("Regex")
        if expression in _BY_EXPRESSION and cut["behavior"] == "Isolated" and not cut["invert"]:
            return _BY_EXPRESSION[expression]
    known = ", ".join(["gpt-2", "smollm", *_BY_EXPRESSION.values()])
    raise _refusal(f"its pre-tokenizer ({', '.join(kinds)}) is none of those known here by llama.cpp's name ({known})")


def _adds_space(definition: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text; everything else about it has to be usual."""
    prefix, escapes = False, False
    for step in (
        *_steps(definition["normalizer"], "normalizers"),
        *_steps(definition["pre_tokenizer"], "pretokenizers"),
    ):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            escapes = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and not step.get("split", True):
            prefix, escapes = step["prepend_scheme"] != "never", True
        else:
            raise _refusal(f"it has the step {step['type']}, which SentencePiece as llama.cpp reads it has not")
    if not escapes:
        raise _refusal("it has byte fallback and does not write spaces as ▁")
    return prefix


def _scores(merges: Sequence[Sequence[str]], texts: Mapping[int, str], vocab_size: int) -> list[float]:
    """Scores under which llama.cpp joins pieces in the order of ``merges``.

    llama.cpp joins the pair whose product scores highest; a merge list orders pairs. Both are the same where all pairs
    of one product stand together, as they do in a list that was made from SentencePiece.
    """
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        product = left + right
        if product in ranks and product != last:
            raise _refusal(f"its merges to {product!r} do not stand together, so no score orders them")
        ranks.setdefault(product, rank)
        last = product
    return [-float(ranks.get(texts.get(token_id, ""), len(merges))) for token_id in range(vocab_size)]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several the one called ``default``."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
