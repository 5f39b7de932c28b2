"""The table of forms that a model can be exported in; a new one is a file here and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mambify.config import HybridConfig
from mambify.export import transformers
from mambify.export.granite_config import granite_layout
from mambify.export.result import Exported
from mambify.families.load import LoadedModel


class Writer(Protocol):
    """Writes a model, whole or not at all; ``dtype`` is one of the format's."""

    def __call__(self, loaded: LoadedModel, out: Path, *, dtype: str, overwrite: bool) -> Exported: ...


@dataclass(frozen=True)
class Format:
    """One form of a model.

    Attributes:
        summary: what reads it, in a few words.
        dtypes: names that ``--dtype`` may have, the default first.
        require: raises UnsupportedError where the form cannot carry a model of this configuration; reads no weight.
        write: see :class:`Writer`.
    """

    summary: str
    dtypes: tuple[str, ...]
    require: Callable[[HybridConfig], object]
    write: Writer


#: name on the command line → format
FORMATS: dict[str, Format] = {
    "transformers": Format(
        "a directory for stock transformers, vLLM and SGLang",
        transformers.DTYPES,
        granite_layout,
        transformers.write,
    ),
}
