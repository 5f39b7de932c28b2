"""What GGUF cannot carry: one line that says why and what to do instead, and nothing on the disk."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mambify import HybridForCausalLM
from mambify.errors import (
    InvalidOptionError,
    MissingDependencyError,
    OutputExistsError,
    OutputWriteError,
    UnsupportedError,
)
from mambify.export.gguf import export_gguf, tensors
from mambify.export.gguf.modelfile import modelfile
from mambify.export.gguf.tokenizer import vocabulary
from mambify.families.load import LoadedModel
from tiny import PRE_TOKENIZERS, byte_tokenizer, sentencepiece_tokenizer

Make = Callable[..., HybridForCausalLM]
HALF = ("mamba2", "attention")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "model.gguf"
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("mixers", "changes", "said"),
    [
        (("mamba1", "attention"), {}, "layers 0 are mamba1.*--mixer mamba2"),
        (HALF, {"qk_norm": True}, "layers 1 keep attention with norms on q and k.*--attention 0"),
        (HALF, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, "layers 1 attend within a window of 7"),
        (HALF, {"hidden_act": "gelu"}, "its MLPs use gelu"),
        (
            HALF,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE scaling 'dynamic'",
        ),
        (HALF, {"head_dim": 64}, "4 heads of 64 are 256 channels.*have 128.*--format transformers"),
        (HALF, {"head_dim": 24}, "heads of 24 do not divide 128.*--format transformers"),
    ],
)
def test_model(tiny_hybrid: Make, path: Path, mixers: tuple[str, ...], changes: dict[str, Any], said: str) -> None:
    model = tiny_hybrid(mixers, vocab_size=320, **changes)
    with pytest.raises(UnsupportedError, match=said):
        export_gguf(model, byte_tokenizer(), path)


def test_bias_on_the_output_of_a_mamba_layer(tiny_hybrid: Make, path: Path) -> None:
    model = tiny_hybrid(HALF, vocab_size=320, attention_output_bias=True)
    with pytest.raises(UnsupportedError, match="output projection of layer 0 has a bias"):
        export_gguf(model, byte_tokenizer(), path)


def test_a_bias_of_zeros_is_left_out(tiny_hybrid: Make, tmp_path: Path) -> None:
    """Of the Mamba layer, which has no place for it; the bias of the layer that keeps attention is in the file."""
    model = tiny_hybrid(HALF, vocab_size=320, attention_output_bias=True)
    torch.nn.init.zeros_(model.model.layers[0].mixer.out_proj.bias)
    export_gguf(model, byte_tokenizer(), tmp_path / "model.gguf")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert "blk.0.ssm_out.weight" in stored and "blk.0.ssm_out.bias" not in stored
    biases = {name for name in stored if name.endswith("out.bias") or name.endswith("output.bias")}
    assert biases == {"blk.1.attn_output.bias"}
    assert torch.equal(stored["blk.1.attn_output.bias"], model.model.layers[1].mixer.o_proj.bias.detach())


def test_a_window_as_long_as_the_context_is_none(tiny_hybrid: Make, tmp_path: Path) -> None:
    windowed = tiny_hybrid(HALF, vocab_size=320, layer_types=["sliding_attention"] * 2, sliding_window=128)
    for name, model in (("windowed", windowed), ("plain", tiny_hybrid(HALF, vocab_size=320))):
        export_gguf(model, byte_tokenizer(), tmp_path / f"{name}.gguf")
    assert (tmp_path / "windowed.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_state_that_no_kernel_takes(tiny_hybrid: Make, path: Path) -> None:
    model = tiny_hybrid(HALF, vocab_size=320, hidden_size=272, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match=r"state of 272.*leave out --pad-state"):
        export_gguf(model, byte_tokenizer(), path, pad_state=True)


def test_unknown_dtype_names_the_nearest(tiny_hybrid: Make, path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="did you mean 'q4_0'"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), path, dtype="q4-0")


def test_type_that_llama_cpp_has_to_make(tiny_hybrid: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "llama_cpp":
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"'q4_k_m' is made by llama\.cpp's own quantiser.*pip install"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), path, dtype="q4_k")


def test_values_that_float16_cannot_hold(tiny_hybrid: Make, path: Path) -> None:
    model = tiny_hybrid(HALF, vocab_size=320)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_up\.weight.*float16 cannot hold.*bf16"):
        export_gguf(model, byte_tokenizer(), path, dtype="f16")


def test_taken_path(tiny_hybrid: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"model\.gguf exists"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), path)
    with pytest.raises(OutputExistsError, match="is a directory: name a file"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), tmp_path, overwrite=True)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_export_leaves_what_was_there(
    tiny_hybrid: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")

    def full(self: tensors.GgufTensor) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.GgufTensor, "value", full)
    with pytest.raises(OutputWriteError, match="No space left on device"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), path, overwrite=True)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def _changed(change: Callable[[dict[str, Any]], None], base: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with its definition changed."""
    definition = json.loads(base.backend_tokenizer.to_str())
    change(definition)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))


def _move_a_merge_of_several_to_the_end(definition: dict[str, Any]) -> None:
    merges = definition["model"]["merges"]
    merges.append(merges.pop(merges.index(["▁t", "h"])))  # "▁" + "th" gives the same piece


def _unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _with(part: str, value: Any, base: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    tokenizer = base or byte_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, value)
    return tokenizer


TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "unigram": (_unigram, "its model is Unigram"),
    "too large": (lambda: byte_tokenizer(merges=100), "it has the token .* and the model 320 rows"),
    "whitespace": (
        lambda: _with("pre_tokenizer", pre_tokenizers.Whitespace()),
        r"\(Whitespace\) does not end in ByteLevel",
    ),
    "other expression": (
        lambda: _with(
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split("x", "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
        "is none of those known here",
    ),
    "lowercase": (
        lambda: _with("normalizer", normalizers.Lowercase()),
        r"changes text before it reads it \(Lowercase\)",
    ),
    "whole words": (
        lambda: _changed(lambda it: it["model"].update(ignore_merges=True), byte_tokenizer()),
        "treats whole words",
    ),
    "sentencepiece, lowercase": (
        lambda: _with("normalizer", normalizers.Lowercase(), sentencepiece_tokenizer()),
        "has the step Lowercase",
    ),
    "merges apart": (
        lambda: _changed(_move_a_merge_of_several_to_the_end, sentencepiece_tokenizer()),
        "do not stand together",
    ),
}


@pytest.mark.parametrize(("make", "said"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_tokenizer(tiny_hybrid: Make, path: Path, make: Callable[[], PreTrainedTokenizerFast], said: str) -> None:
    with pytest.raises(UnsupportedError, match=f"GGUF cannot carry this tokenizer: .*{said}.*--format transformers"):
        export_gguf(tiny_hybrid(HALF, vocab_size=320), make(), path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised(name: str) -> None:
    assert vocabulary(byte_tokenizer(pre_tokenizer=name), 320).pre == name


def test_modelfile_of_a_known_chat_format(tmp_path: Path, tiny_hybrid: Make) -> None:
    export_gguf(tiny_hybrid(HALF, vocab_size=320), byte_tokenizer(), tmp_path / "model.gguf", modelfile=True)
    lines = (tmp_path / "model.Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "PARAMETER num_ctx 128"]
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    assert any(line.startswith('TEMPLATE """{{ if .System }}<|im_start|>system') for line in lines)


def test_modelfile_has_the_system_message_of_the_template(smollm2: LoadedModel) -> None:
    """Where conversations without one get one; the template itself as before, and none where there is none."""
    text = modelfile(Path("a.gguf"), smollm2.tokenizer, 128)
    assert text.endswith('SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""\n')
    assert '\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n' in text
    assert "SYSTEM" not in modelfile(Path("a.gguf"), byte_tokenizer(), 128)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no system message') }}"], ids=["other", "refuses"]
)
def test_modelfile_of_another_chat_format_leaves_it_open(template: str) -> None:
    text = modelfile(Path("a.gguf"), byte_tokenizer(template=template), 128)
    assert 'TEMPLATE """' not in text and "# The chat template is none of ChatML" in text
    assert "#" not in modelfile(Path("a.gguf"), byte_tokenizer(template=None), 128)
