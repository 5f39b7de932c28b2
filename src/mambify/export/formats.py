"""The table of forms that a model can be exported in; a new one is a file here and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mambify.config import HybridConfig
from mambify.export import gguf, transformers
from mambify.export.result import Exported


@dataclass(frozen=True)
class Format:
    """One form of a model.

    Attributes:
        summary: what reads it, in a few words.
        dtypes: names that ``--dtype`` may have, the default first.
        require: raises UnsupportedError where the form cannot carry a model of this configuration; reads no weight.
        write: (loaded model, path, dtype=one of these, overwrite=bool, and a bool for each of ``flags``) → what was
            written, whole or not at all.
        flags: on/off options of this format alone.
    """

    summary: str
    dtypes: tuple[str, ...]
    require: Callable[[HybridConfig], object]
    write: Callable[..., Exported]
    flags: tuple[str, ...] = ()


#: name on the command line → format
FORMATS: dict[str, Format] = {
    "transformers": Format(
        "a directory for stock transformers, vLLM and SGLang",
        transformers.DTYPES,
        transformers.require_representable,
        transformers.write,
    ),
    "gguf": Format(
        "a file for llama.cpp, Ollama and what is built on them",
        gguf.DTYPES,
        gguf.require_representable,
        gguf.write,
        gguf.FLAGS,
    ),
}
