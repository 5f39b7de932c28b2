"""RoPE as a GGUF file describes it, as transformers' parameters; what these cannot say exactly is refused.

The entries mean what llama.cpp computes with them: a factor without a type is linear, and YaRN scales cos and sin by
``attn_factor · (1 + 0.1 ln factor)``, where transformers' ``attention_factor`` is the whole of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mambify.errors import CheckpointError, UnsupportedError

#: the entries of YaRN alone → transformers' names, where they have one
_YARN = {
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
    "scaling.yarn_ext_factor": None,
}
_KNOWN = {
    "dimension_count",
    "freq_base",
    "scale_linear",  # what scaling.factor was called before
    "scaling.type",
    "scaling.factor",
    "scaling.original_context_length",
    "scaling.attn_factor",
    "scaling.finetuned",
    *_YARN,
}


def rope_parameters(
    entries: Mapping[str, Any],
    *,
    head_dim: int,
    context_length: int,
    read_factors: Callable[[], Tensor] | None,
    source: object,
) -> dict[str, Any]:
    """``rope_parameters`` of the model.

    Args:
        entries: the metadata below ``<architecture>.rope.``.
        read_factors: reads the tensor of frequency factors ``[P/2]``, where the file has one: Llama-3 scaling.
        source: how the file is called in errors.

    Raises:
        CheckpointError: a number is out of range.
        UnsupportedError: the file asks for a RoPE that the model has not.
    """
    unknown = sorted(set(entries) - _KNOWN)
    if unknown:
        raise UnsupportedError(f"{source} has RoPE metadata that is not understood: {', '.join(unknown)}")
    rotated = entries.get("dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedError(f"{source} rotates {rotated} of the {head_dim} channels of a head: all have to be")
    theta = float(entries.get("freq_base", 10000.0))
    scaling = _scaling(entries, context_length, source)
    if read_factors is None:
        return {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    if scaling is not None:
        raise UnsupportedError(f"{source} has RoPE frequency factors and {scaling['rope_type']} scaling beside them")
    return _llama3(read_factors(), theta, head_dim, source)


def _scaling(entries: Mapping[str, Any], context_length: int, source: object) -> dict[str, Any] | None:
    """Linear or YaRN scaling; ``None`` where nothing is scaled."""
    kind = entries.get("scaling.type", "linear")
    factor = float(entries.get("scaling.factor", entries.get("scale_linear", 1.0))) or 1.0  # 0 means none
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{source} has RoPE scaling '{kind}': none, linear and yarn are supported")
    if kind == "none":
        return None
    if not 1 <= factor < math.inf:
        raise CheckpointError(f"{source} has a RoPE scaling factor of {factor}: it has to be at least 1")
    attention = float(entries.get("scaling.attn_factor", 1.0))
    if kind == "yarn":
        return _yarn(entries, factor, attention, context_length, source)
    if attention != 1 or _YARN.keys() & entries.keys():
        raise UnsupportedError(f"{source} has linear RoPE scaling with parameters of another kind of scaling")
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(
    entries: Mapping[str, Any], factor: float, attention: float, context_length: int, source: object
) -> dict[str, Any]:
    extrapolated = float(entries.get("scaling.yarn_ext_factor", 1.0))
    if extrapolated != 1:
        raise UnsupportedError(f"{source} has YaRN that extrapolates by {extrapolated}: only 1 is supported")
    original = int(entries.get("scaling.original_context_length", 0)) or context_length
    if original < 1:
        raise CheckpointError(f"{source} has an original context length of {original}: it has to be at least 1")
    given = {ours: float(entries[key]) for key, ours in _YARN.items() if ours and key in entries}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * (1 + 0.1 * math.log(factor)),
    } | given


def _llama3(factors: Tensor, theta: float, head_dim: int, source: object) -> dict[str, Any]:
    """Llama-3 scaling, rebuilt from the factors that it gives and checked against them."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if factors.shape != (head_dim // 2,) or not torch.allclose(_llama3_factors(rope, head_dim), factors, rtol=1e-3):
        raise UnsupportedError(f"{source} has RoPE frequency factors that are not Llama-3's")
    return rope


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """How far Llama-3 scaling stretches each RoPE wavelength: 1 for short ones, ``factor`` for long, ``[P/2]``."""
    wavelengths = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth: Tensor = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / rope["factor"] + smooth)
