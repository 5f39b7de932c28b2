"""Reads a GGUF file (llama.cpp's format) as a Hugging Face config and weights, one dequantised tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from mambify.errors import CheckpointError, UnsupportedError
from mambify.families.gguf_format import open_gguf
from mambify.families.gguf_rope import rope_parameters
from mambify.families.registry import known_families

if TYPE_CHECKING:
    from mambify.families.base import Family

#: GGUF tensor name → Hugging Face name, for the architectures of :mod:`mambify.families`
_NAMES = (
    (r"^token_embd\.weight$", "model.embed_tokens.weight"),
    (r"^output_norm\.weight$", "model.norm.weight"),
    (r"^output\.weight$", "lm_head.weight"),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_(q|k)_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"^blk\.(\d+)\.attn_(q|k|v)\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_EMBEDDING, _QUERY, _ROPE_FREQS = "token_embd.weight", "blk.0.attn_q.weight", "rope_freqs.weight"


class GgufFile:
    """One GGUF file.

    Raises:
        CheckpointError: it cannot be parsed.
        UnsupportedError: its architecture is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = open_gguf(path)
        architecture = self._field("general.architecture")
        by_name = {f.gguf_name: f for f in known_families().values() if f.gguf_name}
        if architecture not in by_name:
            raise UnsupportedError(
                f"{path} is of GGUF architecture '{architecture}', which is not supported (supported: "
                f"{', '.join(sorted(by_name))}). A family is one file in mambify/families: see docs/families.md"
            )
        self.family: Family = by_name[architecture]
        self._architecture = architecture

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file carries the vocabulary."""
        return self._field("tokenizer.ggml.model") is not None

    @property
    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name for how text is cut into words."""
        found = self._field("tokenizer.ggml.pre")
        return found if isinstance(found, str) else None

    def special_tokens(self) -> dict[str, int]:
        """Transformers' names of the special tokens that the file gives ids of."""
        ids = {name: self._field(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def license(self) -> dict[str, str]:
        """The licence as the metadata gives it, under the names that model cards have for it."""
        names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
        found = {name: self._field(f"general.{key}") for name, key in names.items()}
        return {name: value for name, value in found.items() if isinstance(value, str) and value}

    def _field(self, key: str, default: Any = None) -> Any:
        value = self._container.metadata.get(key)
        return default if value is None else value

    def config(self) -> PreTrainedConfig:
        """The Hugging Face config that the metadata describes.

        Raises:
            CheckpointError: an entry is missing, or says what cannot be.
        """
        try:
            return AutoConfig.for_model(self.family.model_type, **self._facts())
        except (ArithmeticError, StrictDataclassError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path} has metadata that makes no model: {reason}") from error

    def _fact(self, key: str, default: Any = None) -> Any:
        """The metadata entry ``key`` of this architecture; without a default it has to be there."""
        value = self._field(f"{self._architecture}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata '{self._architecture}.{key}'")
        return value

    def _facts(self) -> dict[str, Any]:
        fact, tensors = self._fact, self._container.tensors
        for needed in (_EMBEDDING, _QUERY):
            if needed not in tensors:
                raise CheckpointError(f"{self.path} lacks the tensor '{needed}'")
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
        heads, num_layers = fact("attention.head_count"), fact("block_count")
        if num_layers != len(blocks):
            raise CheckpointError(f"{self.path} says {num_layers} layers and holds {len(blocks)}")
        head_dim = fact("attention.key_length", fact("embedding_length") // heads)
        if tensors[_QUERY].shape[0] != heads * head_dim:
            raise CheckpointError(f"{self.path} says {heads} heads of {head_dim}, and its queries are of another size")
        facts = {
            "vocab_size": tensors[_EMBEDDING].shape[0],
            "hidden_size": fact("embedding_length"),
            "intermediate_size": fact("feed_forward_length"),
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": fact("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": fact("context_length"),
            "rms_norm_eps": float(f"{fact('attention.layer_norm_rms_epsilon'):.6g}"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": self._rope(head_dim, fact("context_length")),
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
        }
        if self.family.model_type == "llama":
            facts["attention_bias"] = "blk.0.attn_q.bias" in tensors
            facts["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        return facts

    def _rope(self, head_dim: int, context_length: int) -> dict[str, Any]:
        prefix = f"{self._architecture}.rope."
        entries = {
            key.removeprefix(prefix): value
            for key, value in self._container.metadata.items()
            if key.startswith(prefix) and value is not None
        }
        has_factors = _ROPE_FREQS in self._container.tensors
        return rope_parameters(
            entries,
            head_dim=head_dim,
            context_length=context_length,
            read_factors=(lambda: self._container.read(_ROPE_FREQS)) if has_factors else None,
            source=self.path,
        )

    def stream(self, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, float32 tensor) for every weight that is ``wanted``, dequantised one at a time."""
        config = self.config()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for stored_name in self._container.tensors:
            if stored_name == _ROPE_FREQS:
                continue
            name = _hugging_face_name(stored_name)
            if not wanted(name):
                continue
            value = self._container.read(stored_name)
            projection = name.split(".")[-2]
            if self.family.gguf_permuted and projection in heads:
                if value.shape[0] % (2 * heads[projection]):
                    raise CheckpointError(
                        f"{self.path}: '{stored_name}' has {value.shape[0]} rows for {heads[projection]} heads"
                    )
                value = _split_halves(value, heads[projection])
            yield name, value


def _hugging_face_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise CheckpointError(f"GGUF tensor '{name}' has no place in the architecture")


def _split_halves(rows: Tensor, num_heads: int) -> Tensor:
    """Rows with the two rotary halves of a head interleaved (GGUF) → one half after the other (Hugging Face)."""
    per_head: Tensor = rows.unflatten(0, (num_heads, -1, 2))
    return per_head.transpose(1, 2).reshape(rows.shape)
