"""Tables in Markdown, and names that tell nothing of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells may hold any text."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot end its cell or its row."""
    return " ".join(text.replace("|", "\\|").split())


def without_way(name: str) -> str:
    """A name without the folders of the machine that it comes from."""
    return Path(name).name if Path(name).is_absolute() else name
