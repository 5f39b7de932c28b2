"""Every error a user of mambify can meet, in one tree.

    MambifyError                      exit status 1: the work was asked for correctly and failed
    ├── UsageError                    exit status 2: asked for wrongly; nothing was read further or written
    │   ├── UnknownSourceError        no such teacher, model, file or data set
    │   ├── UnsupportedError          an architecture, mixer or combination mambify cannot represent
    │   ├── InvalidOptionError        an option out of range, unknown, or in conflict with another
    │   ├── RecipeError               a recipe that cannot be read, or has an unknown or ill-typed key
    │   ├── OutputExistsError         the output path is taken and ``overwrite`` was not given
    │   ├── CheckpointError           weights missing, truncated, of a wrong shape, or tampered with
    │   ├── TokenizerMismatchError    two models, or a model and its data, do not share a tokenizer
    │   └── DataOverlapError          training and evaluation text share documents
    ├── TrainingDivergedError         the loss became NaN or infinite; the last good checkpoint is kept
    ├── OutputWriteError              the disk refused a write; what was there before is intact
    └── MissingDependencyError        an optional package is not installed; the message names the extra

Raise the most specific one with one line that says what is wrong and the nearest valid value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MambifyError(Exception):
    """Base of everything mambify raises on purpose."""

    exit_status = 1


class UsageError(MambifyError):
    """The request itself is wrong; nothing was written."""

    exit_status = 2


class UnknownSourceError(UsageError):
    """A teacher, model, file or data set that does not exist."""


class UnsupportedError(UsageError):
    """An architecture, mixer or combination that mambify cannot represent."""


class InvalidOptionError(UsageError):
    """An option out of range, unknown, or in conflict with another."""


class RecipeError(UsageError):
    """A recipe that cannot be read, or holds an unknown or ill-typed key."""


class OutputExistsError(UsageError):
    """The output path is taken and ``overwrite`` was not given."""


class CheckpointError(UsageError):
    """Weights that are missing, truncated, of a wrong shape, or tampered with."""


class TokenizerMismatchError(UsageError):
    """Two models, or a model and its data, do not share a tokenizer."""


class DataOverlapError(UsageError):
    """Training and evaluation text share documents."""


class TrainingDivergedError(MambifyError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class OutputWriteError(MambifyError):
    """The disk refused a write; what was there before is intact."""


class MissingDependencyError(MambifyError):
    """An optional package is not installed; the message names the extra that brings it."""


_FEW = 40


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Names the nearest of ``known`` to ``word``, or lists them, if they are few: the tail of an error message."""
    options = sorted(known)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return (
        f"known: {', '.join(options)}" if len(options) <= _FEW else f"none of the {len(options)} known ones is like it"
    )
