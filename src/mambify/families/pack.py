"""Writes a student without its teacher: only the weights that the teacher has not (see ``mixers_only``).

Which weights these are is found by comparing every weight with the base's, so a student whose MLPs were trained too
keeps them, and nothing has to be declared.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambify import __version__
from mambify.errors import CheckpointError, InvalidOptionError
from mambify.families import safetensors
from mambify.families.aliases import GROUP, find_alias, is_reserved
from mambify.families.load import LoadedModel, as_dtype, dtype_of, load
from mambify.families.mixers_only import HEAD, KNOWN, MIXERS, Fingerprint, head_of, open_base
from mambify.hub import prepare_config, write_companions
from mambify.io import atomic_directory, atomic_write_text, require_new
from mambify.trimmed_head import known_ids

_ALIAS = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        model: the directory that holds the mixers.
        base: the model that completes it.
        fingerprint: of what the base gives.
        num_new: parameters in ``mixers.safetensors``.
        num_kept: parameters taken from the base.
        weight_bytes: size of ``mixers.safetensors``.
        total_bytes: size of everything in the directory.
    """

    model: Path
    base: str
    fingerprint: str
    num_new: int
    num_kept: int
    weight_bytes: int
    total_bytes: int


def pack(
    source: str | Path,
    path: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "bfloat16",
    alias: str | None = None,
    overwrite: bool = False,
) -> Packed:
    """Saves the student ``source`` as a directory that holds mixers only, whole or not at all.

    Args:
        base: the model that its other weights are from: an alias, a Hub id, a directory or a GGUF file; the teacher
            that the student remembers by default.
        dtype: of what is stored, float32 parameters of state-space mixers aside; ``auto`` keeps the student's.
        alias: write a Python package around it, which makes the model known by this name where it is installed.

    Raises:
        InvalidOptionError: no base is known, or the alias cannot be one.
        CheckpointError: the base shares no weight with the student, or has all of them.
        UsageError: as :func:`mambify.families.load.load` of either.
        OutputExistsError, OutputWriteError: nothing was written.
    """
    path = require_new(path, overwrite=overwrite)
    stored = as_dtype(dtype)
    if alias is not None and not _ALIAS.fullmatch(alias):
        raise InvalidOptionError(f"'{alias}' cannot be an alias: take small letters, digits, - and ., as in my-model")
    if alias is not None and is_reserved(alias):
        raise InvalidOptionError(
            f"'{alias}' always means the model that mambify knows by this name: take another alias"
        )
    student = load(source)
    name = base or student.model.config.teacher
    if not name:
        raise InvalidOptionError(f"{student.source} does not say who its teacher is: name it with --base")
    name = _lasting(name)
    inside = Path() if alias is None else Path("src") / _import_name(alias) / "model"
    with atomic_directory(path, overwrite=overwrite) as directory:
        model = directory / inside
        model.mkdir(parents=True, exist_ok=True)
        packed = _write_mixers(student, name, model, stored or student.model.dtype)
        if alias is not None:
            _write_package(directory, alias)
    return packed(path / inside)


def _lasting(base: str) -> str:
    """A base's name as it is understood from every working directory."""
    is_path = find_alias(base) is None and Path(base).exists()
    return str(Path(base).resolve()) if is_path else base


def _write_mixers(student: LoadedModel, base: str, directory: Path, dtype: torch.dtype) -> Callable[[Path], Packed]:
    """Writes the directory; what it returns is told where that ends up."""
    model = student.model
    own = dict(model.named_parameters())
    num_kept, shares_a_matrix, fingerprint = 0, False, Fingerprint()
    opened, known_W = open_base(base, f"the base of {student.source},"), known_ids(model.lm_head)
    rows_of = None if known_W is None else head_of(opened.config)

    def is_same(ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and torch.equal(theirs.to(ours.device, ours.dtype), ours)

    for name, tensor in opened.weights({*own, rows_of}.__contains__):
        kept = [name] if name in own and is_same(own[name], tensor) else []
        if known_W is not None and name == rows_of and is_same(own[HEAD], tensor[known_W.to(tensor.device)]):
            kept.append(HEAD)
        if kept:
            fingerprint.add(name, tensor)
            num_kept += sum(own.pop(each).numel() for each in kept)
            shares_a_matrix = shares_a_matrix or tensor.dim() > 1
    if not shares_a_matrix:  # norms of ones and biases of zeros are the same in strangers
        raise CheckpointError(f"{student.source} shares no weight with '{base}': that is not its base")
    if not own:
        raise CheckpointError(f"{student.source} has all its weights from '{base}': nothing is left to pack")
    weights = {name: p.detach().to(dtype_of(model, name, dtype)).contiguous() for name, p in own.items()}
    num_new = sum(tensor.numel() for tensor in weights.values())
    if known_W is not None:
        weights[KNOWN] = known_W
    safetensors.write_file(directory / MIXERS, weights)
    config = prepare_config(model.config, base={"name": base, "fingerprint": fingerprint.value()})
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    if student.tokenizer is not None:
        student.tokenizer.save_pretrained(directory)
    write_companions(directory, config, model.provenance)
    safetensors.record_checksums(directory, [directory / MIXERS])
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}

    def packed(where: Path) -> Packed:
        return Packed(where, base, fingerprint.value(), num_new, num_kept, sizes[MIXERS], sum(sizes.values()))

    return packed


def _import_name(alias: str) -> str:
    return "mambify_" + re.sub(r"[.-]", "_", alias)


def _write_package(directory: Path, alias: str) -> None:
    """What makes an installable Python package of the model that lies in it."""
    package = _import_name(alias)
    atomic_write_text(
        directory / "src" / package / "__init__.py", f'"""The model `{alias}` of mambify: data only."""\n'
    )
    atomic_write_text(
        directory / "pyproject.toml",
        f"""\
# Written by `mambify pack`; the whole directory is replaced when it is packed again.
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "mambify-{alias}"
version = "{__version__}"
description = "The model `{alias}` of mambify: weights of its mixers, without those of its teacher."
readme = "src/{package}/model/README.md"
requires-python = ">=3.11"

[project.entry-points."{GROUP}"]
"{alias}" = "{package}:model"

[tool.hatch.build]
dev-mode-dirs = ["src"]

[tool.hatch.build.targets.wheel]
packages = ["src/{package}"]
""",
    )
