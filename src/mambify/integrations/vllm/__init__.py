"""A plugin of vLLM: it serves directories that mambify saved, as they are.

Most hybrids are better served as an export (``mambify export``), which vLLM knows by itself. This is for what the stock
architecture has no place for: a norm on q and k in kept attention (Qwen3), and heads that are not hidden size over
heads. vLLM calls :func:`register` through the entry point ``vllm.general_plugins`` in each of its processes.

Written against the interfaces of vLLM 0.33 and not run with it: see docs/export.md.
"""

from __future__ import annotations

from transformers import AutoConfig

from mambify.config import HybridConfig
from mambify.errors import MissingDependencyError
from mambify.integrations.vllm.config import ServedConfig

ARCHITECTURE = "HybridForCausalLM"


def register() -> None:
    """Makes the architecture known to vLLM and its configuration to transformers; may be called again.

    Raises:
        MissingDependencyError: there is no vLLM.
    """
    try:
        from vllm import ModelRegistry
    except ImportError as error:
        raise MissingDependencyError("vLLM is not installed: pip install vllm") from error
    AutoConfig.register(HybridConfig.model_type, ServedConfig, exist_ok=True)
    # A name, not the class: importing the model would initialise CUDA before vLLM forks.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
