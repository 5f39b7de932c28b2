"""The table of forms that a model can be exported in; a new one is a file here and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mambify.config import HybridConfig
from mambify.export import gguf, transformers
from mambify.export.granite_config import granite_layout
from mambify.export.result import Exported


@dataclass(frozen=True)
class Format:
    """One form of a model.

    Attributes:
        summary: what reads it, in a few words.
        dtypes: names that ``--dtype`` may have, the default first.
        require: raises UnsupportedError where the form cannot carry a model of this configuration; reads no weight.
        write: (loaded model, path, dtype=one of these, overwrite=bool, and each of ``options``) → what was written,
            whole or not at all.
        options: names of the options that this format alone has.
    """

    summary: str
    dtypes: tuple[str, ...]
    require: Callable[[HybridConfig], object]
    write: Callable[..., Exported]
    options: tuple[str, ...] = ()


#: name on the command line → format
FORMATS: dict[str, Format] = {
    "transformers": Format(
        "a directory for stock transformers, vLLM and SGLang",
        transformers.DTYPES,
        granite_layout,
        transformers.write,
        transformers.OPTIONS,
    ),
    "gguf": Format(
        "a file for llama.cpp, Ollama and what is built on them",
        gguf.DTYPES,
        gguf.require_representable,
        gguf.write,
        gguf.OPTIONS,
    ),
}
