"""mambify: pretrained Transformers into hybrid Mamba models that keep their quality, cost less and run faster.

>>> import mambify
>>> student = mambify.convert("smollm2", mixer="mamba2", attention=0.5)
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name → module that defines it; loaded on first use, so that the command line starts without torch
_PUBLIC = {
    "HybridConfig": "mambify.config",
    "HybridForCausalLM": "mambify.model",
    "MambifyError": "mambify.errors",
    "convert": "mambify.conversion.convert",
    "custom_generate": "mambify.decode.custom",
    "export_gguf": "mambify.export.gguf",
    "export_transformers": "mambify.export.transformers",
    "generate": "mambify.decode.generate",
    "load": "mambify.families.load",
    "release": "mambify.decode.kept",
    "stream": "mambify.decode.stream",
    "save": "mambify.families.load",
    "pack": "mambify.families.pack",
    "synthesize": "mambify.data.synthesize",
}

if TYPE_CHECKING:
    from mambify.config import HybridConfig
    from mambify.conversion.convert import convert
    from mambify.data.synthesize import synthesize
    from mambify.decode.custom import custom_generate
    from mambify.decode.generate import generate
    from mambify.decode.kept import release
    from mambify.decode.stream import stream
    from mambify.errors import MambifyError
    from mambify.export.gguf import export_gguf
    from mambify.export.transformers import export_transformers
    from mambify.families.load import load, save
    from mambify.families.pack import pack
    from mambify.model import HybridForCausalLM

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "MambifyError",
    "__version__",
    "convert",
    "custom_generate",
    "export_gguf",
    "export_transformers",
    "generate",
    "load",
    "pack",
    "release",
    "save",
    "stream",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mambify' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def _is_command() -> bool:
    """Whether this process is the ``mambify`` command, whose ``--help`` must not wait for torch.

    That is ``python -m mambify``, or the script that was installed under this name; no other script of the name.
    """
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module
        return ("-m", "mambify") in pairwise(sys.orig_argv)
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    scripts = (Path(sysconfig.get_path("scripts", scheme), "mambify").resolve() for scheme in schemes)
    return bool(sys.argv) and Path(sys.argv[0]).resolve() in scripts


if not _is_command():  # commands import what they need by themselves
    importlib.import_module("mambify.families.load")  # registers the model with transformers' auto classes
