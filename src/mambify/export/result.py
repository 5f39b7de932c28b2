"""What an export gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mambify.export.lint import Finding


@dataclass(frozen=True)
class Exported:
    """A model in a form for other tools.

    Attributes:
        path: the directory or file that was written.
        dtype: of its weights, by the name that was asked for.
        weight_bytes: of all weight files.
        findings: what engines would trip over; see :mod:`mambify.export.lint`.
        notes: what a user has to know to run it, one sentence each.
    """

    path: Path
    dtype: str
    weight_bytes: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
