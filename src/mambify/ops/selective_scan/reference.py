"""Mamba1's selective scan in pure torch, a chunk of tokens at a time.

Letters: B batch, T tokens, Q tokens a chunk, J sub-heads, M channels a sub-head, N state size.

Every channel and state entry decays by itself, so there is no matrix form: inside a chunk the decays exp(Δ A)
and the writes (Δ x) Bᵀ of all tokens are made at once, then the recurrence itself runs token by token, one
multiply-add over [B, J, M, N] each. The [B, T, J, M, N] states never exist together: the backward pass keeps
the state that enters each chunk and makes the others again, chunk by chunk, from the last to the first. Time
comes first in memory, so that the recurrence walks over contiguous slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import accumulation_dtype, documents


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
    """See :func:`mambify.ops.selective_scan.selective_scan`."""
    exact = accumulation_dtype(x_BTJM, dt_BTJM, B_BTJN, C_BTJN, initial_state_BJMN)
    if initial_state_BJMN is None:
        initial_state_BJMN = x_BTJM.new_zeros((x_BTJM.shape[0], *A_JMN.shape), dtype=exact)
    kept_TB = None
    if seq_idx_BT is not None:
        own_BT = documents(seq_idx_BT)
        kept_BT = torch.ones_like(own_BT, dtype=exact)
        kept_BT[:, 1:] = (own_BT[:, 1:] == own_BT[:, :-1]).to(exact)
        kept_TB = kept_BT.T.contiguous()
    x_TBJM, dt_TBJM, B_TBJN, C_TBJN = (
        v.to(exact).transpose(0, 1).contiguous() for v in (x_BTJM, dt_BTJM, B_BTJN, C_BTJN)
    )
    y_TBJM, final_BJMN = _scan(
        x_TBJM, dt_TBJM, A_JMN.to(exact), B_TBJN, C_TBJN, initial_state_BJMN.to(exact), kept_TB, chunk_size
    )
    if D_JM is not None:
        y_TBJM = torch.addcmul(y_TBJM, D_JM.to(exact), x_TBJM)
    return y_TBJM.transpose(0, 1).to(x_BTJM.dtype).contiguous(), final_BJMN


def selective_scan_step(
    x_BJM: Tensor,
    dt_BJM: Tensor,
    A_JMN: Tensor,
    B_BJN: Tensor,
    C_BJN: Tensor,
    D_JM: Tensor | None,
    state_BJMN: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.selective_scan.selective_scan_step`."""
    exact = accumulation_dtype(x_BJM, dt_BJM, B_BJN, C_BJN, state_BJMN)
    x, dt_BJM = x_BJM.to(exact), dt_BJM.to(exact)
    decay_BJMN = torch.exp(dt_BJM.unsqueeze(-1) * A_JMN.to(exact))
    write_BJMN = (dt_BJM * x).unsqueeze(-1) * B_BJN.to(exact).unsqueeze(-2)
    new_BJMN = torch.addcmul(write_BJMN, decay_BJMN, state_BJMN.to(exact))
    y_BJM = (new_BJMN * C_BJN.to(exact).unsqueeze(-2)).sum(dim=-1)
    if D_JM is not None:
        y_BJM = y_BJM + D_JM.to(exact) * x
    return y_BJM.to(x_BJM.dtype), new_BJMN.to(state_BJMN.dtype)


def _states(
    dt_QBJM: Tensor,
    written_QBJM: Tensor,
    A_JMN: Tensor,
    B_QBJN: Tensor,
    enter_BJMN: Tensor,
    kept_QB: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The decay at each token of a chunk and the state after it, both [Q, B, J, M, N]; ``written`` is Δ x."""
    decay_QBJMN = (dt_QBJM.unsqueeze(-1) * A_JMN).exp_()
    if kept_QB is not None:
        decay_QBJMN *= kept_QB[..., None, None, None]
    state_QBJMN = written_QBJM.unsqueeze(-1) * B_QBJN.unsqueeze(-2)
    before_BJMN = enter_BJMN
    for state_BJMN, decay_BJMN in zip(state_QBJMN.unbind(), decay_QBJMN.unbind(), strict=True):
        before_BJMN = state_BJMN.addcmul_(decay_BJMN, before_BJMN)
    return decay_QBJMN, state_QBJMN


class _Scan(torch.autograd.Function):
    """The scan without the skip, time first, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TBJM: Tensor,
        dt_TBJM: Tensor,
        A_JMN: Tensor,
        B_TBJN: Tensor,
        C_TBJN: Tensor,
        initial_BJMN: Tensor,
        kept_TB: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        tokens = len(x_TBJM)
        y_TBJM = torch.empty_like(x_TBJM)
        enter_BJMN, enters = initial_BJMN, []
        with torch.autocast(x_TBJM.device.type, enabled=False):
            for start in range(0, tokens, chunk_size):
                chunk = slice(start, min(start + chunk_size, tokens))
                kept_QB = None if kept_TB is None else kept_TB[chunk]
                dt_QBJM = dt_TBJM[chunk]
                enters.append(enter_BJMN)
                _, state_QBJMN = _states(dt_QBJM, dt_QBJM * x_TBJM[chunk], A_JMN, B_TBJN[chunk], enter_BJMN, kept_QB)
                y_TBJM[chunk] = torch.matmul(state_QBJMN, C_TBJN[chunk].unsqueeze(-1)).squeeze(-1)
                enter_BJMN = state_QBJMN[-1].clone()
        ctx.save_for_backward(x_TBJM, dt_TBJM, A_JMN, B_TBJN, C_TBJN, kept_TB, *enters)
        ctx.chunk_size = chunk_size
        return y_TBJM, enter_BJMN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBJM: Tensor, dfinal_BJMN: Tensor) -> tuple[Tensor | None, ...]:
        x_TBJM, dt_TBJM, A_JMN, B_TBJN, C_TBJN, kept_TB, *enters = ctx.saved_tensors
        tokens, chunk_size = len(x_TBJM), ctx.chunk_size
        dx_TBJM, ddt_TBJM = torch.empty_like(x_TBJM), torch.empty_like(dt_TBJM)
        dB_TBJN, dC_TBJN = torch.empty_like(B_TBJN), torch.empty_like(C_TBJN)
        dA_JMN = torch.zeros_like(A_JMN)
        dstate_BJMN = dfinal_BJMN
        with torch.autocast(x_TBJM.device.type, enabled=False):
            for number in reversed(range(len(enters))):
                chunk = slice(number * chunk_size, min((number + 1) * chunk_size, tokens))
                kept_QB = None if kept_TB is None else kept_TB[chunk]
                x_QBJM, dt_QBJM, B_QBJN, dy_QBJM = (
                    x_TBJM[chunk],
                    dt_TBJM[chunk],
                    B_TBJN[chunk],
                    dy_TBJM[chunk],
                )
                written_QBJM = dt_QBJM * x_QBJM
                decay_QBJMN, state_QBJMN = _states(dt_QBJM, written_QBJM, A_JMN, B_QBJN, enters[number], kept_QB)
                dC_TBJN[chunk] = torch.matmul(dy_QBJM.unsqueeze(-2), state_QBJMN).squeeze(-2)
                # The gradient of every state: from last to first, each token hands decay · gradient back.
                dstate_QBJMN = dy_QBJM.unsqueeze(-1) * C_TBJN[chunk].unsqueeze(-2)
                dstate_QBJMN[-1] += dstate_BJMN
                for t in reversed(range(len(dstate_QBJMN) - 1)):
                    dstate_QBJMN[t].addcmul_(decay_QBJMN[t + 1], dstate_QBJMN[t + 1])
                dstate_BJMN = decay_QBJMN[0] * dstate_QBJMN[0]
                dB_TBJN[chunk] = torch.matmul(written_QBJM.unsqueeze(-2), dstate_QBJMN).squeeze(-2)
                dwritten_QBJM = torch.matmul(dstate_QBJMN, B_QBJN.unsqueeze(-1)).squeeze(-1)
                # Gradient of Δ A at each token: dS_t ∘ (decay_t ∘ S_{t-1}).
                drate_QBJMN = decay_QBJMN.mul_(dstate_QBJMN)
                drate_QBJMN[1:] *= state_QBJMN[:-1]
                drate_QBJMN[0] *= enters[number]
                dA_JMN += (drate_QBJMN * dt_QBJM.unsqueeze(-1)).sum(dim=(0, 1))
                ddt_TBJM[chunk] = (drate_QBJMN.mul_(A_JMN)).sum(dim=-1).addcmul_(dwritten_QBJM, x_QBJM)
                dx_TBJM[chunk] = dwritten_QBJM * dt_QBJM
        return dx_TBJM, ddt_TBJM, dA_JMN, dB_TBJN, dC_TBJN, dstate_BJMN, None, None


_scan: Callable[..., tuple[Tensor, Tensor]] = _Scan.apply
