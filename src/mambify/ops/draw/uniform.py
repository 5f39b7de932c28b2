"""Uniform numbers that depend on a seed and a counter alone: a row draws the same ones wherever it is batched.

Letters: S rows, N numbers of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, pick_backend

if HAS_TRITON:
    from mambify.ops.draw import triton_uniform as kernels

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its constants as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX = (-4658895280553007687, -7723592293110705685)


def uniform(seed_S: Tensor, counter_S: Tensor, *, backend: str = "auto") -> Tensor:
    """Float32 numbers in [0, 1), multiples of 2⁻²⁴, from int64 seeds and int64 counters.

    Args:
        seed_S, counter_S: of shapes that broadcast, with one or two dimensions.
        backend: "auto", "reference" or "triton", which give the same numbers.
    """
    seed_S, counter_S = torch.broadcast_tensors(seed_S, counter_S)
    chosen = pick_backend("uniform", backend, backends_on(seed_S.device, supported=seed_S.dim() in (1, 2)))
    if chosen == "triton":
        return kernels.uniform(seed_S, counter_S)
    z_S = _mixed(_mixed(seed_S + _GOLDEN) + counter_S * _GOLDEN)
    return _shifted(z_S, 40).to(torch.float32) * 2.0**-24


def uniforms(seed_S: Tensor, place_S: Tensor, count: int, *, apart: int, backend: str = "auto") -> Tensor:
    """N = ``count`` numbers ``[S, N]`` a row, as :func:`uniform` gives them for counters from ``apart · place`` on.

    Args:
        seed_S, place_S: int64.
        apart: between the counters of neighbouring places.
        backend: "auto", "reference" or "triton", which give the same numbers.
    """
    if pick_backend("uniforms", backend, backends_on(seed_S.device)) == "triton":
        return kernels.uniform(seed_S[:, None].expand(-1, count), place_S[:, None], apart=apart)
    number_N = torch.arange(count, device=seed_S.device)
    return uniform(seed_S[:, None], place_S[:, None] * apart + number_N, backend="reference")


def _mixed(z_S: Tensor) -> Tensor:
    z_S = (z_S ^ _shifted(z_S, 30)) * _MIX[0]
    z_S = (z_S ^ _shifted(z_S, 27)) * _MIX[1]
    return z_S ^ _shifted(z_S, 31)


def _shifted(z_S: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros, which ``>>`` on signed integers does not."""
    return (z_S >> bits) & ((1 << (64 - bits)) - 1)
