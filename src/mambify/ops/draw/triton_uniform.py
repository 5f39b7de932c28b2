"""Uniform numbers from seeds and counters as one Triton kernel; in torch they are thirty of a few microseconds.

Letters: S rows, T numbers of each.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As in mambify.ops.draw.uniform.
_GOLDEN: tl.constexpr = tl.constexpr(-7046029254386353131)
_MIX_0: tl.constexpr = tl.constexpr(-4658895280553007687)
_MIX_1: tl.constexpr = tl.constexpr(-7723592293110705685)
_BLOCK = 128


def uniform(seed: Tensor, counter: Tensor, *, apart: int = 0) -> Tensor:
    """See :func:`mambify.ops.draw.uniform.uniform`; both of one shape, ``[S]`` or ``[S, T]``.

    Args:
        apart: if not 0, counters ``[S, 1]`` are places whose own counters lie this far apart, as
            :func:`mambify.ops.draw.uniform.uniforms` takes them.
    """
    out = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    seed_ST, counter_ST = (v if v.dim() == 2 else v[:, None] for v in (seed, counter))
    if out.numel():
        with torch.cuda.device_of(seed):  # Triton launches on the current device
            _uniform[(triton.cdiv(out.numel(), _BLOCK),)](
                seed_ST, counter_ST, out, out.numel(), seed_ST.shape[1], *seed_ST.stride(), *counter_ST.stride(),
                APART=apart, BLOCK=_BLOCK, num_warps=1,
            )  # fmt: skip
    return out


@triton.jit
def _uniform(
    seed_ptr, counter_ptr, out_ptr, count, numbers, seed_row, seed_column, counter_row, counter_column,
    APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    row, column = place // numbers, place % numbers
    seed = tl.load(seed_ptr + row * seed_row + column * seed_column, mask=here, other=0)
    if APART:
        counter = tl.load(counter_ptr + row * counter_row, mask=here, other=0) * APART + column
    else:
        counter = tl.load(counter_ptr + row * counter_row + column * counter_column, mask=here, other=0)
    z = _mixed(_mixed(seed + _GOLDEN) + counter * _GOLDEN)
    tl.store(out_ptr + place, _shifted(z, 40).to(tl.float32) * 5.9604644775390625e-08, mask=here)  # 2⁻²⁴


@triton.jit
def _mixed(z):
    z = (z ^ _shifted(z, 30)) * _MIX_0
    z = (z ^ _shifted(z, 27)) * _MIX_1
    return z ^ _shifted(z, 31)


@triton.jit
def _shifted(z, bits: tl.constexpr):
    """Shifts right and fills with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
