"""Points transformers' auto classes at the installed package: pip install mambify."""

from mambify.config import HybridConfig
from mambify.model import HybridForCausalLM

__all__ = ["HybridConfig", "HybridForCausalLM"]
