"""GGUF files for llama.cpp, and for Ollama, LM Studio and others that run it.

    write       checks, metadata, tensors, in this order        layout      a Mamba2 layer in llama.cpp's sizes
    checks      what llama.cpp has no place for                 tensors     weights under its names and in its order
    metadata    origin and sizes                                quantise    in which type each tensor is stored
    tokenizer   vocabulary, merges, pre-tokenizer               modelfile   what Ollama reads beside it

Written against the source of llama.cpp (src/models/granite-hybrid.cpp, mamba-base.cpp) and checked by running it.
"""

from __future__ import annotations

from mambify.export.gguf.checks import require_representable
from mambify.export.gguf.quantise import DTYPES
from mambify.export.gguf.write import OPTIONS, export_gguf, write

__all__ = ["DTYPES", "OPTIONS", "export_gguf", "require_representable", "write"]
