"""The convolution of new tokens after a ring as a Triton kernel: a program has one row and BLOCK_C channels.

The K − 1 inputs before the head and the T new ones go through registers, each read once; the new ones are written
behind the head, where no program reads.

Letters: S rows, T new tokens, C channels, K width, R places of the ring.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.overlap import launch_options, wait_for_others
from mambify.ops.ring import RingPlace, check_contiguous

_BUSY = 132 * 4  # programs that fill an H100: four on each multiprocessor


def supports(x_STC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, ring_SRC: Tensor) -> bool:
    """Whether the kernel takes these inputs: widths 2 to 8, x and the ring in one dtype, at most float32."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    given = [v for v in (x_STC, weight_CK, bias_C, ring_SRC) if v is not None]
    return 2 <= weight_CK.shape[1] <= 8 and x_STC.dtype == ring_SRC.dtype and all(v.dtype in dtypes for v in given)


def conv_replay(
    x_STC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    ring_SRC: Tensor,
    place: RingPlace,
    silu: bool,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.conv_replay.conv_replay`."""
    slots, new, channels = x_STC.shape
    check_contiguous("conv_replay", ring_SRC)
    if x_STC.stride(2) != 1 and channels != 1:
        x_STC = x_STC.contiguous()
    y_STC = torch.empty_like(x_STC, memory_format=torch.contiguous_format)
    block_c = 256 if slots * triton.cdiv(channels, 256) >= _BUSY else 64  # eight or two channels a thread
    with torch.cuda.device_of(x_STC):  # Triton launches on the current device
        _replay[(triton.cdiv(channels, block_c), slots)](
            x_STC, weight_CK, None if bias_C is None else bias_C.contiguous(), ring_SRC, y_STC,
            place.head_S, place.active_S, *x_STC.stride()[:2], *weight_CK.stride(),
            C=channels, K=weight_CK.shape[1], T=new, R=place.capacity, SILU=silu, BLOCK_C=block_c, num_warps=1,
            **launch_options(overlap),
        )  # fmt: skip
    return y_STC


@triton.jit
def _replay(
    x_ptr, weight_ptr, bias_ptr, ring_ptr, y_ptr, head_ptr, active_ptr, x_row, x_token, weight_c, weight_k,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_others(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < C
    head = tl.load(head_ptr + row).to(tl.int32)
    active = tl.load(active_ptr + row) != 0
    y_row = y_ptr + row * T * C + c
    if active:
        ring_row = ring_ptr + row * R * C + c
        window = ()
        for k in tl.static_range(K - 1):
            window += (tl.load(ring_row + ((head + k - (K - 1)) & (R - 1)) * C, mask=here, other=0.0),)
        for t in tl.static_range(T):
            window += (tl.load(x_ptr + row * x_row + t * x_token + c, mask=here, other=0.0),)
        taps = ()
        for k in tl.static_range(K):
            taps += (tl.load(weight_ptr + c * weight_c + k * weight_k, mask=here, other=0.0).to(tl.float32),)
        bias = tl.zeros((BLOCK_C,), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + c, mask=here, other=0.0).to(tl.float32)
        for t in tl.static_range(T):
            total = bias
            for k in tl.static_range(K):
                total += window[t + k].to(tl.float32) * taps[k]
            if SILU:
                total *= tl.sigmoid(total)
            tl.store(y_row + t * C, total.to(y_ptr.dtype.element_ty), mask=here)
            tl.store(ring_row + ((head + t) & (R - 1)) * C, window[t + K - 1], mask=here)
    else:
        for t in tl.static_range(T):
            tl.store(y_row + t * C, tl.zeros((BLOCK_C,), y_ptr.dtype.element_ty), mask=here)
