"""Whether a model can be exported, and what engines would trip over: answered from its configuration alone."""

from __future__ import annotations

from pathlib import Path

from mambify.export.granite_config import granite_config, granite_layout
from mambify.export.lint import ARCHITECTURE, Finding, lint
from mambify.families.load import load_config
from mambify.families.sources import resolve
from mambify.io import read_json


def check(source: str | Path) -> list[Finding]:
    """Findings about a directory of GraniteMoeHybrid, as it is, or about what a model of ours would be exported as.

    Raises:
        UnsupportedError: it cannot be represented in the stock architecture; says why.
        UnknownSourceError, CheckpointError: as :func:`mambify.load`.
    """
    where = resolve(source)
    if where.gguf is None:
        stored = read_json(where.directory / "config.json")
        if stored.get("model_type") == ARCHITECTURE:
            return lint(stored)
    config = load_config(source)
    return lint(granite_config(config, granite_layout(config), dtype="float32"))
