"""The library llama.cpp itself, through llama-cpp-python, where that is installed."""

from __future__ import annotations

import ctypes
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from mambify.errors import MambifyError, MissingDependencyError

_ERROR = 4  # ggml's log level
_last_errors: deque[str] = deque(maxlen=3)


def require_llama_cpp(purpose: str) -> Any:
    """The module ``llama_cpp``, which from now on keeps its log to itself.

    Args:
        purpose: what needs it; the beginning of the error message.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} needs llama.cpp: pip install 'mambify[llama-cpp]'") from error
    _set_up(llama_cpp)
    _last_errors.clear()
    return llama_cpp


def last_errors() -> str:
    """What llama.cpp said last when something failed; empty where it said nothing."""
    return "; ".join(_last_errors)


def quantise(llama_cpp: Any, source: Path, target: Path, file_type: int) -> None:
    """Writes the GGUF file ``source`` again, its matrices as llama.cpp's ``file_type`` has them.

    Raises:
        MambifyError: llama.cpp gave up.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise MambifyError(f"llama.cpp's quantiser gave up: {last_errors()}")


@cache
def _set_up(llama_cpp: Any) -> Any:
    """Starts the library; returns its log callback, which has to live as long as the process."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep_errors(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _last_errors.append(" ".join(text.decode("utf-8", "replace").split()))

    llama_cpp.llama_log_set(keep_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return keep_errors
