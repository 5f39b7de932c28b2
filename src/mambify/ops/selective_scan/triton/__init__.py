"""The selective scan as Triton kernels: sequential in time, in registers, parallel over channels and long segments.

Letters: B batch, T tokens, J sub-heads, M channels a sub-head, N state size, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import last_adjacent
from mambify.ops.selective_scan.triton.backward import backward_kernel, reversed_scan_kernel
from mambify.ops.selective_scan.triton.forward import combine_kernel, scan_kernel

_TILE = 256  # state entries of a program, eight a thread
_UNROLL = 8  # tokens whose inputs are loaded together
_UNROLL_BACKWARD = 4  # their states, decays and inputs are all in registers
#: The state is saved for the backward pass where a multiple of this many tokens begins.
SAVED_EVERY = 32
_SUBCORES = 132 * 4  # schedulers of an H100; each wants a warp at least, and the backward pass several


def supports(x_BTJM: Tensor, A_JMN: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these inputs: states of at most 256, at most float32."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    given = [v for v in (x_BTJM, A_JMN, *others) if v is not None]
    return A_JMN.shape[-1] <= _TILE and all(v.dtype in dtypes for v in given)


def selective_scan(
    x_BTJM: Tensor,
    dt_BTJM: Tensor,
    A_JMN: Tensor,
    B_BTJN: Tensor,
    C_BTJN: Tensor,
    D_JM: Tensor | None,
    initial_state_BJMN: Tensor | None,
    seq_idx_BT: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.selective_scan.selective_scan`; ``chunk_size`` is the reference's, unused here."""
    inputs = (x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, initial_state_BJMN)
    differentiated = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    return _apply(*inputs, seq_idx_BT, differentiated)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTJM: Tensor,
        dt_BTJM: Tensor,
        A_JMN: Tensor,
        B_BTJN: Tensor,
        C_BTJN: Tensor,
        D_JM: Tensor | None,
        initial_BJMN: Tensor | None,
        seq_idx_BT: Tensor | None,
        differentiated: bool,
    ) -> tuple[Tensor, Tensor]:
        x_BTJM, dt_BTJM, B_BTJN, C_BTJN = (last_adjacent(v) for v in (x_BTJM, dt_BTJM, B_BTJN, C_BTJN))
        A_JMN, D_JM = A_JMN.contiguous(), None if D_JM is None else D_JM.contiguous()
        batch, tokens, heads, channels = x_BTJM.shape
        size = A_JMN.shape[-1]
        enter = None if initial_BJMN is None else initial_BJMN.float().contiguous()
        y_BTJM = torch.empty_like(x_BTJM, memory_format=torch.contiguous_format)
        final_BJMN = x_BTJM.new_empty((batch, heads, channels, size), dtype=torch.float32)
        saved = None
        if differentiated:
            chunks = triton.cdiv(tokens, SAVED_EVERY)
            saved = x_BTJM.new_empty((batch, chunks, heads, channels, size), dtype=torch.float32)
        # Half the channels a warp where that keeps more of the GPU busy: no sum runs over them here.
        tile = _tile(channels, size, _TILE // 2 if batch * heads < 2 * _SUBCORES else _TILE)
        programs = heads * triton.cdiv(channels, tile["BLOCK_M"])
        segment = _segment(tokens, batch * programs, enough=_SUBCORES, wanted=2 * _SUBCORES, shortest=256)
        number = triton.cdiv(tokens, segment)
        common = tile | {
            "X_TOKEN": x_BTJM.stride(1), "DT_TOKEN": dt_BTJM.stride(1), "B_TOKEN": B_BTJN.stride(1),
            "C_TOKEN": C_BTJN.stride(1), "J": heads, "M": channels, "N": size, "SAVED_EVERY": SAVED_EVERY,
            "UNROLL": _UNROLL,
        }  # fmt: skip
        strides = (
            tokens, segment, *_strides(x_BTJM), *_strides(dt_BTJM), *_strides(B_BTJN), *_strides(C_BTJN),
            *_row_strides(seq_idx_BT),
        )  # fmt: skip
        if number > 1:
            local, decay = final_BJMN.new_empty((2, batch, number, heads, channels, size))
            scan_kernel[(programs * number, batch)](
                x_BTJM, dt_BTJM, A_JMN, B_BTJN, None, None, None, seq_idx_BT, None, None, local, decay,
                *strides, **common, num_warps=1,
            )  # fmt: skip
            enter = _combined(local, decay, enter, is_reversed=False)
        scan_kernel[(programs * number, batch)](
            x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, enter, seq_idx_BT, y_BTJM, saved, final_BJMN, None,
            *strides, **common, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, seq_idx_BT, saved)
        ctx.initial_dtype = None if initial_BJMN is None else initial_BJMN.dtype
        ctx.set_materialize_grads(False)
        return y_BTJM, final_BJMN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTJM: Tensor | None, dfinal_BJMN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, seq_idx_BT, saved = ctx.saved_tensors
        batch, tokens, heads, channels = x_BTJM.shape
        size = A_JMN.shape[-1]
        dy_BTJM = torch.zeros_like(x_BTJM) if dy_BTJM is None else last_adjacent(dy_BTJM)
        enter = None if dfinal_BJMN is None else dfinal_BJMN.contiguous()
        tile = _tile(channels, size, _TILE)
        parts = triton.cdiv(channels, tile["BLOCK_M"])
        programs = heads * parts
        segment = _segment(tokens, batch * programs, enough=4 * _SUBCORES, wanted=4 * _SUBCORES, shortest=128)
        number = triton.cdiv(tokens, segment)
        shape = {"J": heads, "M": channels, "N": size}
        if number > 1:
            local, decay = saved.new_empty((2, batch, number, heads, channels, size))
            reversed_scan_kernel[(programs * number, batch)](
                dt_BTJM, A_JMN, C_BTJN, seq_idx_BT, dy_BTJM, local, decay, tokens, segment,
                *_strides(dt_BTJM), *_strides(C_BTJN), *_row_strides(seq_idx_BT), *_strides(dy_BTJM),
                DT_TOKEN=dt_BTJM.stride(1), C_TOKEN=C_BTJN.stride(1), DY_TOKEN=dy_BTJM.stride(1), **shape, **tile,
                UNROLL=_UNROLL, num_warps=1,
            )  # fmt: skip
            enter = _combined(local, decay, enter, is_reversed=True)
        dx_BTJM = torch.empty_like(x_BTJM, memory_format=torch.contiguous_format)
        ddt_BTJM = torch.empty_like(dt_BTJM, memory_format=torch.contiguous_format)
        dA = saved.new_empty((batch, number, heads, channels, size))
        dD = None if D_JM is None else saved.new_empty((batch, number, heads, channels))
        dinitial_BJMN = None if ctx.initial_dtype is None else saved.new_empty((batch, heads, channels, size))
        # Where one warp has not all channels of a sub-head, each channel block's share of dB and dC is kept apart.
        dB, dC = (v.new_empty((parts, *v.shape), dtype=torch.float32 if parts > 1 else None) for v in (B_BTJN, C_BTJN))
        scratch = saved.new_empty((batch * programs * number, SAVED_EVERY // _UNROLL_BACKWARD, *tile.values()))
        backward_kernel[(programs * number, batch)](
            x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, saved, seq_idx_BT, dy_BTJM, enter, scratch,
            dx_BTJM, ddt_BTJM, dA, dB, dC, dD, dinitial_BJMN,
            tokens, segment, *_strides(x_BTJM), *_strides(dt_BTJM), *_strides(B_BTJN), *_strides(C_BTJN),
            *_row_strides(seq_idx_BT), *_strides(dy_BTJM), dB.stride(0),
            X_TOKEN=x_BTJM.stride(1), DT_TOKEN=dt_BTJM.stride(1), B_TOKEN=B_BTJN.stride(1),
            C_TOKEN=C_BTJN.stride(1), DY_TOKEN=dy_BTJM.stride(1), SAVED_EVERY=SAVED_EVERY, **shape, **tile,
            UNROLL=_UNROLL_BACKWARD, num_warps=1, maxnreg=168,  # three warps a scheduler instead of two
        )  # fmt: skip
        return (
            dx_BTJM,
            ddt_BTJM,
            dA.sum((0, 1)).to(A_JMN.dtype),
            _summed(dB, B_BTJN.dtype),
            _summed(dC, C_BTJN.dtype),
            None if dD is None or D_JM is None else dD.sum((0, 1)).to(D_JM.dtype),
            None if dinitial_BJMN is None else dinitial_BJMN.to(ctx.initial_dtype),
            None,
            None,
        )


_apply: Callable[..., tuple[Tensor, Tensor]] = _SelectiveScan.apply


def _strides(v: Tensor) -> tuple[int, int]:
    """Of the batch and of the sub-heads; a token's is a constant of the kernel."""
    return v.stride(0), v.stride(2)


def _row_strides(seq_idx_BT: Tensor | None) -> tuple[int, int]:
    return (0, 0) if seq_idx_BT is None else (seq_idx_BT.stride(0), seq_idx_BT.stride(1))


def _tile(channels: int, size: int, entries: int) -> dict[str, int]:
    """Channels and state entries of a program, powers of two, ``entries`` together at the most."""
    block_n = triton.next_power_of_2(size)
    block_m = min(triton.next_power_of_2(channels), max(1, entries // block_n))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n}


def _segment(tokens: int, programs: int, *, enough: int, wanted: int, shortest: int) -> int:
    """Tokens of a segment, a multiple of SAVED_EVERY: all of them where there are ``enough`` programs already."""
    number = 1 if programs >= enough else min(triton.cdiv(wanted, programs), max(1, tokens // shortest))
    chunks: int = triton.cdiv(triton.cdiv(tokens, number), SAVED_EVERY)
    return chunks * SAVED_EVERY


def _combined(local: Tensor, decay: Tensor, first: Tensor | None, *, is_reversed: bool) -> Tensor:
    """What enters each segment; all are [B, S, J, M, N], ``first`` [B, J, M, N]."""
    batch, number = local.shape[:2]
    size = local[0, 0].numel()
    enter = torch.empty_like(local)
    combine_kernel[(triton.cdiv(size, 128), batch)](
        local, decay, first, enter, number, SIZE=size, REVERSED=is_reversed, BLOCK=128, num_warps=1
    )
    return enter


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
