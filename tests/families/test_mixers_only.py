"""A student packed without its teacher is the same student; on another base it is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import mambify
from mambify import HybridForCausalLM
from mambify.conversion.cut import cut
from mambify.errors import (
    CheckpointError,
    InvalidOptionError,
    OutputExistsError,
    OutputWriteError,
    UnknownSourceError,
)
from mambify.families.load import LoadedModel, load_config
from mambify.families.mixers_only import MIXERS
from mambify.trimmed_head import TrimmedHead

Teacher = Callable[..., PreTrainedModel]
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tiny_teacher: Teacher, tmp_path: Path) -> Path:
    tiny_teacher("smollm2-like").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, tmp_path: Path, *, dtype: str = "auto", mlp: bool = False, **changes: Any) -> HybridForCausalLM:
    """A student whose new weights are what training leaves: values that bfloat16 does not have."""
    student = mambify.convert(base, dtype=dtype, **changes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for index in student.config.converted_layers:
            layer = student.model.layers[index]
            for parameter in (*layer.mixer.parameters(), *(layer.mlp.parameters() if mlp else ())):
                parameter.add_(0.01 * torch.randn_like(parameter))
    mambify.save(student, tmp_path / "student")
    return student


def rounded(student: HybridForCausalLM, base: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The student's weights as they are after storing those that are not the base's in ``dtype``."""
    kept = dict(mambify.load(base, dtype=student.dtype).model.named_parameters())
    exact = ("A_log", "dt_bias", "D")
    return {
        name: p.detach()
        if name.endswith(exact) or (name in kept and torch.equal(kept[name], p))
        else p.detach().to(dtype).to(p.dtype)
        for name, p in student.named_parameters()
    }


def same_logits(one: HybridForCausalLM, other: HybridForCausalLM) -> bool:
    with torch.no_grad():
        return torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@pytest.mark.parametrize("family", ["smollm2-like", "qwen2", "mistral"])
def test_round_trip(family: str, mixer: str, tiny_teacher: Teacher, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_teacher(family).save_pretrained(base)
    student = trained(base, tmp_path, mixer=mixer)
    packed = mambify.pack(tmp_path / "student", tmp_path / "mixers")
    loaded = mambify.load(tmp_path / "mixers").model
    expected = rounded(student, base)
    after = dict(loaded.named_parameters())
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
    assert not same_logits(loaded, student)  # the rounding is seen
    student.load_state_dict(expected, strict=False)
    assert same_logits(loaded, student)
    assert not loaded.training
    assert packed.num_new + packed.num_kept == sum(p.numel() for p in student.parameters())


def test_what_is_stored(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    packed = mambify.pack(tmp_path / "student", tmp_path / "mixers")
    stored = load_file(tmp_path / "mixers" / MIXERS)
    leaves = [name for name, _ in student.model.layers[0].mixer.named_parameters()]
    mixers = {f"model.layers.{i}.mixer.{leaf}" for i in (0, 2) for leaf in leaves}
    assert stored.keys() == mixers
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias", ".D")) else torch.bfloat16), name
    assert packed.num_new == sum(value.numel() for value in stored.values())
    assert packed.weight_bytes == (tmp_path / "mixers" / MIXERS).stat().st_size
    assert packed.total_bytes == sum(file.stat().st_size for file in (tmp_path / "mixers").iterdir())
    assert not (tmp_path / "mixers" / "model.safetensors").exists()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "mixers").iterdir()} == {0o644}


@pytest.mark.parametrize("family", ["smollm2-like", "qwen2", "llama3"])  # the head is the embeddings in the first
@pytest.mark.parametrize("learned", [False, True])
def test_the_words_of_a_draft(family: str, learned: bool, tiny_teacher: Teacher, tmp_path: Path) -> None:
    """They are rows of the base's head, unless they were trained."""
    base = tmp_path / "base"
    tiny_teacher(family).save_pretrained(base)
    teacher = mambify.load(base).model
    draft = cut(teacher, [0, 1])
    draft.lm_head = TrimmedHead.of(teacher.lm_head, torch.tensor([0, 1, 2, 7, 30, 31]))
    draft.config.draft_vocabulary, draft.config.tie_word_embeddings = 6, False
    with torch.no_grad():
        draft.model.layers[0].mlp.down_proj.weight.mul_(1.25)
        if learned:
            draft.lm_head.weight.mul_(1.25)
    mambify.save(draft, tmp_path / "draft")
    packed = mambify.pack(tmp_path / "draft", tmp_path / "mixers", base=str(base), dtype="auto")
    stored = {"model.layers.0.mlp.down_proj.weight", "lm_head.token_ids"} | ({"lm_head.weight"} if learned else set())
    assert load_file(tmp_path / "mixers" / MIXERS).keys() == stored
    loaded = mambify.load(tmp_path / "mixers").model
    assert torch.equal(loaded.lm_head.weight, draft.lm_head.weight)
    assert same_logits(loaded, draft)
    assert packed.num_new + packed.num_kept == sum(p.numel() for p in draft.parameters())
    other = mambify.load(base)
    with torch.no_grad():
        other.model.lm_head.weight[40] += 1  # a word that the draft does not know
    mambify.save(other.model, tmp_path / "other")
    shutil.rmtree(base)
    (tmp_path / "other").rename(base)
    if family == "smollm2-like" or not learned:
        with pytest.raises(CheckpointError, match="is not the base"):
            mambify.load(tmp_path / "mixers")


def test_mlps_that_were_trained_are_stored_too(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path, mlp=True)
    mambify.pack(tmp_path / "student", tmp_path / "mixers", dtype="float32")
    stored = load_file(tmp_path / "mixers" / MIXERS)
    assert {n for n in stored if ".mlp." in n} == {
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 2) for p in ("gate", "up", "down")
    }
    assert same_logits(mambify.load(tmp_path / "mixers").model, student)


def test_a_student_in_bfloat16_of_a_float32_base(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path, dtype="bfloat16")
    packed = mambify.pack(tmp_path / "student", tmp_path / "mixers")
    loaded = mambify.load(tmp_path / "mixers").model
    assert loaded.dtype == torch.bfloat16
    assert same_logits(loaded, student)
    assert packed.num_kept > packed.num_new / 2
    assert mambify.load(tmp_path / "mixers", dtype="float32").model.dtype == torch.float32


def test_repacked_it_is_the_same_file(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    first = mambify.pack(tmp_path / "student", tmp_path / "one")
    second = mambify.pack(tmp_path / "one", tmp_path / "two")
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "one" / MIXERS).read_bytes() == (tmp_path / "two" / MIXERS).read_bytes()


def test_loaded_and_saved_it_is_a_whole_model(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    loaded = mambify.load(tmp_path / "mixers").model
    shutil.rmtree(base)
    for way in (lambda path: mambify.save(loaded, path), loaded.save_pretrained):
        way(tmp_path / "whole")
        assert json.loads((tmp_path / "whole" / "config.json").read_text())["base"] is None
        assert same_logits(mambify.load(tmp_path / "whole").model, loaded)
        shutil.rmtree(tmp_path / "whole")


def test_converted_further(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    further = mambify.convert(tmp_path / "mixers", attention=0.25)
    assert further.config.base is None
    assert further.num_converted == 3


def test_the_base_in_another_form_and_place(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    saved = mambify.save(mambify.load(base).model, tmp_path / "saved")
    there = mambify.pack(tmp_path / "student", tmp_path / "one", base=str(base))
    here = mambify.pack(tmp_path / "student", tmp_path / "two", base=str(saved))
    assert there.fingerprint == here.fingerprint
    expected = mambify.load(tmp_path / "one").model
    assert not same_logits(expected, mambify.load(base).model)
    shutil.rmtree(base)
    assert load_config(tmp_path / "one").converted_layers == student.config.converted_layers
    with pytest.raises(UnknownSourceError, match=r"one holds mixers only, and its base '.*base' is not here"):
        mambify.load(tmp_path / "one")
    assert same_logits(mambify.load(tmp_path / "two").model, expected)
    shutil.move(saved, base)
    assert same_logits(mambify.load(tmp_path / "one").model, expected)


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = trained(Path("base"), tmp_path)
    mambify.pack("student", "mixers", dtype="float32")
    monkeypatch.chdir("/")
    assert same_logits(mambify.load(tmp_path / "mixers").model, student)


def edit(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def one_bit(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(torch.int32).view(-1)[7] ^= 1

    return change


@pytest.mark.parametrize(
    "load", [mambify.load, HybridForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]
)
def test_a_base_that_differs_by_a_bit_is_refused(load: Callable[[Path], object], base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    edit(base, one_bit("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"is not the base that .*mixers was made with") as caught:
        load(tmp_path / "mixers")
    assert "\n" not in str(caught.value)


def test_what_is_not_taken_from_the_base_may_differ(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers", dtype="float32")
    edit(base, one_bit("model.layers.0.self_attn.q_proj.weight"))
    assert same_logits(mambify.load(tmp_path / "mixers").model, student)


def test_a_base_of_other_shapes_is_refused(base: Path, tmp_path: Path, tiny_teacher: Teacher) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    tiny_teacher("llama3").save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"mixers.*shape"):
        mambify.load(tmp_path / "mixers")


def test_a_base_that_holds_mixers_only_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    with pytest.raises(CheckpointError, match="a base is a whole model"):
        mambify.pack(tmp_path / "student", tmp_path / "again", base=str(tmp_path / "mixers"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("entry", ["x", {"name": "base"}, {"name": 1, "fingerprint": "0"}])
def test_a_base_that_is_not_described(entry: object, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    path = tmp_path / "mixers" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": entry}))
    with pytest.raises(CheckpointError):
        mambify.load(tmp_path / "mixers")


def test_a_changed_or_absent_file_is_noticed(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    weights = tmp_path / "mixers" / MIXERS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        mambify.load(tmp_path / "mixers")
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {MIXERS}"):
        mambify.load(tmp_path / "mixers")
    (tmp_path / "mixers" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {MIXERS}"):
        mambify.load(tmp_path / "mixers")


def test_refusals_write_nothing(base: Path, tmp_path: Path, tiny_teacher: Teacher) -> None:
    trained(base, tmp_path)
    out = tmp_path / "mixers"
    tiny_teacher("smollm2-like", seed=5).save_pretrained(tmp_path / "stranger")
    with pytest.raises(CheckpointError, match=r"shares no weight with '.*stranger': that is not its base"):
        mambify.pack(tmp_path / "student", out, base=str(tmp_path / "stranger"))
    with pytest.raises(CheckpointError, match="nothing is left to pack"):
        mambify.pack(base, out, base=str(base))
    with pytest.raises(UnknownSourceError, match=r"the base of .*student, 'nowhere' is not here"):
        mambify.pack(tmp_path / "student", out, base="nowhere")
    with pytest.raises(InvalidOptionError, match="unknown dtype 'int8'"):
        mambify.pack(tmp_path / "student", out, dtype="int8")
    assert not out.exists()
    mambify.pack(tmp_path / "student", out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        mambify.pack(tmp_path / "student", out)
    mambify.pack(tmp_path / "student", out, overwrite=True)


def test_a_student_that_names_no_teacher(base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    student.config.teacher = ""
    mambify.save(student, tmp_path / "nameless")
    with pytest.raises(InvalidOptionError, match="name it with --base"):
        mambify.pack(tmp_path / "nameless", tmp_path / "mixers")
    mambify.pack(tmp_path / "nameless", tmp_path / "mixers", base=str(base))


def test_a_full_disk_leaves_what_was_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    before = (tmp_path / "mixers" / MIXERS).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mambify.families.safetensors.save_file", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        mambify.pack(tmp_path / "student", tmp_path / "mixers", overwrite=True)
    assert (tmp_path / "mixers" / MIXERS).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "mixers", "student"]


@pytest.mark.parametrize("load", [HybridForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_transformers_loads_it_too(load: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    student = trained(base, tmp_path)
    student.generation_config.max_length = 77
    mambify.save(student, tmp_path / "student", overwrite=True)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    ours = mambify.load(tmp_path / "mixers").model
    theirs, report = load(tmp_path / "mixers", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs) is HybridForCausalLM
    assert not theirs.training
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert same_logits(ours, theirs)
    assert theirs.generation_config.max_length == 77
    assert theirs.config.base is None
    half = load(tmp_path / "mixers", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.layers[0].mixer.A_log.dtype == torch.float32
    assert same_logits(half, mambify.load(tmp_path / "mixers", dtype="bfloat16").model)


@pytest.mark.parametrize("packed", [False, True])
def test_in_a_subfolder(packed: bool, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    if packed:
        mambify.pack(tmp_path / "student", tmp_path / "mixers")
    name = "mixers" if packed else "student"
    there = HybridForCausalLM.from_pretrained(tmp_path, subfolder=name)
    assert same_logits(there, mambify.load(tmp_path / name).model)


def test_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository is downloaded at the revision that was asked for."""
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    asked: list[object] = []

    def download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options))
        return str(tmp_path / "mixers")

    config = mambify.HybridConfig.from_pretrained(tmp_path / "mixers")
    monkeypatch.setattr("mambify.hub.snapshot_download", download)
    there = HybridForCausalLM.from_pretrained("owner/name", config=config, revision="v1")
    assert asked == [("owner/name", {"revision": "v1"})]
    assert same_logits(there, mambify.load(tmp_path / "mixers").model)


AUTO = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(repr(model(torch.arange(3, 40)[None]).logits.double().sum().item()))
"""


def test_trust_remote_code_in_a_process_without_the_import(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUTO, str(tmp_path / "mixers")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = mambify.load(tmp_path / "mixers").model(IDS).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-3)


def test_reading_never_holds_a_second_copy(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is read, every one before it is in its place; what the mixers replace is not read at all."""
    from mambify.families import load as module

    trained(base, tmp_path)
    mambify.pack(tmp_path / "student", tmp_path / "mixers")
    placed: list[str] = []
    real = module.set_parameter

    def watch(model: torch.nn.Module, name: str, *args: object, **kwargs: object) -> None:
        there = [n for n, p in model.named_parameters() if p.device.type != "meta"]
        assert sorted(there) == sorted(placed)
        real(model, name, *args, **kwargs)
        placed.append(name)

    monkeypatch.setattr(module, "set_parameter", watch)
    loaded = mambify.load(tmp_path / "mixers").model
    assert sorted(placed) == sorted(name for name, _ in loaded.named_parameters())


def test_of_the_real_teacher(smollm2: LoadedModel, tmp_path: Path) -> None:
    """Half of SmolLM2: under 45 MB with its tokenizer, and the same model again."""
    student = mambify.convert(smollm2, mixer="mamba2", attention=0.5)
    mambify.save(student, tmp_path / "student", tokenizer=smollm2.tokenizer)
    packed = mambify.pack(tmp_path / "student", tmp_path / "mixers")
    assert (packed.base, packed.num_new, packed.num_kept) == ("smollm2", 18_406_485, 121_243_968)
    assert packed.total_bytes <= 45e6
    loaded = mambify.load(tmp_path / "mixers")
    assert loaded.tokenizer is not None
    assert smollm2.tokenizer is not None
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids, ids)
    with torch.no_grad():
        for index in student.config.converted_layers:  # new mixers are the student's own: the teacher is not touched
            student.model.layers[index].mixer.bfloat16().float()
        assert torch.equal(loaded.model(ids).logits, student(ids).logits)
    theirs = dict(smollm2.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        if not any(name.startswith(f"model.layers.{i}.mixer.") for i in student.config.converted_layers):
            assert torch.equal(parameter, theirs[name]), name
