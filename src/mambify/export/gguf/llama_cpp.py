"""The library llama.cpp itself, through llama-cpp-python, where that is installed."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

from mambify.errors import MambifyError, MissingDependencyError


def require_llama_cpp(purpose: str) -> Any:
    """The module ``llama_cpp``, which from now on prints errors only.

    Args:
        purpose: what needs it; the beginning of the error message.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs llama.cpp: pip install 'mambify[llama-cpp]'") from error
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # by default every tensor has its line on stderr
    llama_cpp.llama_backend_init()
    return llama_cpp


def quantise(llama_cpp: Any, source: Path, target: Path, file_type: int) -> None:
    """Writes the GGUF file ``source`` again, its matrices as llama.cpp's ``file_type`` has them.

    Raises:
        MambifyError: llama.cpp gave up.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if status:
        raise MambifyError(f"llama.cpp's quantiser gave up with status {status}")
