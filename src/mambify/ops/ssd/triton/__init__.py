"""Mamba2's scan as Triton kernels, forward and backward: three launches each.

Forward: the decays' running sums, a pass over the chunks that stores the state entering each (both in states.py), the
outputs of all chunks at once (outputs.py). Backward: the same pass in reverse, the gradients of all chunks at once,
then those of the decays (gradients.py). Between them the states are kept in the inputs' dtype. Key/value heads are
never repeated, sums over them are made in registers, nothing is added atomically: results are the same bits each time.

Heads grouped otherwise (U of B, V of C, see ops/head_groups.py) are read where they are too; only for gradients, which
are summed over key/value heads, are they repeated first.

Letters: B batch, T tokens, H query heads, G key/value heads, R = H / G, P head dimension, N state size, c chunks,
Q tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import last_adjacent
from mambify.ops.head_groups import as_key_values
from mambify.ops.ssd.triton.gradients import decay_gradient_kernel, gradient_kernel
from mambify.ops.ssd.triton.outputs import output_kernel
from mambify.ops.ssd.triton.states import decay_kernel, state_kernel

_WIDEST = 128
_MULTIPROCESSORS = 132  # of an H100
_FORGET = -160.0  # an exponent of 2 whose power is 0 in float32, even among the denormals


def supports(x_BTGP: Tensor, dt_BTH: Tensor, B_BTGN: Tensor, C_BTHN: Tensor, initial_BHPN: Tensor | None) -> bool:
    """Whether the kernels take these inputs: P and N up to 128, nothing in float64."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    given = [v for v in (x_BTGP, dt_BTH, B_BTGN, C_BTHN, initial_BHPN) if v is not None]
    return all(v.dtype in dtypes for v in given) and max(x_BTGP.shape[-1], C_BTHN.shape[-1]) <= _WIDEST


def ssd_scan(
    x_BTGP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTHN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.ssd.ssd_scan`."""
    work = torch.promote_types(torch.promote_types(x_BTGP.dtype, B_BTGN.dtype), C_BTHN.dtype)
    given = (x_BTGP, dt_BTH, A_H, B_BTGN, C_BTHN, D_H, initial_state_BHPN)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given):
        x_BTGP, B_BTGN, C_BTHN = as_key_values(x_BTGP, B_BTGN, C_BTHN, dt_BTH.shape[2])
    with torch.cuda.device_of(x_BTGP):  # Triton launches on the current device
        y_BTHP, final_BHPN = _scan(
            x_BTGP.to(work),
            dt_BTH,
            A_H.float(),
            B_BTGN.to(work),
            C_BTHN.to(work),
            None if D_H is None else D_H.float(),
            None if initial_state_BHPN is None else initial_state_BHPN.float(),
            seq_idx_BT,
        )
    return y_BTHP.to(x_BTGP.dtype), final_BHPN


@dataclass(frozen=True)
class _Plan:
    """Sizes of tiles and programs for one shape and dtype. Blocks are what one program makes, of P or of N channels.

    Attributes:
        ragged: whether tiles hold more than T, P or N.
        state_p, state_n: blocks of the state passes.
        output_p: block of the outputs.
        gradient_p, gradient_n: blocks of dx, and of dB and dC.
        inner_p, inner_n: as much of a sum over P or N is made at a time.
        output_registers, gradient_registers: the most a thread may take.
    """

    Q: int
    ragged: bool
    state_p: int
    state_n: int
    output_p: int
    gradient_p: int
    gradient_n: int
    inner_p: int
    inner_n: int
    output_registers: int | None
    gradient_registers: int | None


def _plan(x_BTGP: Tensor, heads: int, N: int) -> _Plan:
    batch, tokens, _, P = x_BTGP.shape
    tile_p, tile_n = (max(16, triton.next_power_of_2(size)) for size in (P, N))
    exact = x_BTGP.dtype == torch.float32  # products without tensor cores: all their operands go to registers
    # Tiles of 64 rows become wgmma (see tiles.py), which is not worth it where P or N is less.
    widest = 32 if exact or min(tile_p, tile_n) < 64 else 64
    state_p, state_n = min(tile_p, widest), min(tile_n, widest)
    # The state passes go through the chunks one by one; only heads and blocks run side by side.
    while batch * heads * (tile_p // state_p) * (tile_n // state_n) < _MULTIPROCESSORS and max(state_p, state_n) > 32:
        if state_p > 32:
            state_p //= 2
        else:
            state_n //= 2
    return _Plan(
        Q=widest,
        ragged=(tile_p, tile_n) != (P, N) or tokens % widest != 0,
        state_p=state_p,
        state_n=state_n,
        output_p=min(tile_p, widest),
        # Blocks of dB and dC each make the Q×Q products anew, so there is one where its registers suffice.
        gradient_p=tile_p if widest == 64 else min(tile_p, 32),
        gradient_n=tile_n if widest == 64 else min(tile_n, 32),
        inner_p=min(tile_p, 32) if exact else tile_p,
        inner_n=min(tile_n, 32) if exact else tile_n,
        # 128: four programs of four warps fit a multiprocessor; 168: three.
        output_registers=None if exact else 128,
        gradient_registers=None if exact or max(tile_p, tile_n) > 64 else 168,
    )


class _Scan(torch.autograd.Function):
    """The launches; arguments as :func:`ssd_scan` hands them on."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTGP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTHN: Tensor,
        D_H: Tensor | None,
        initial_BHPN: Tensor | None,
        seq_idx_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x_BTGP, B_BTGN, C_BTHN = (last_adjacent(v) for v in (x_BTGP, B_BTGN, C_BTHN))
        batch, tokens, heads = dt_BTH.shape
        (groups, P), N = x_BTGP.shape[2:], C_BTHN.shape[-1]
        plan = _plan(x_BTGP, heads, N)
        chunks = triton.cdiv(tokens, plan.Q)
        steps_BHcQ = x_BTGP.new_empty((batch, heads, chunks, plan.Q), dtype=torch.float32)
        sums_BHcQ = torch.empty_like(steps_BHcQ, dtype=torch.float64 if x_BTGP.dtype == torch.float32 else None)
        states_BcHPN = x_BTGP.new_empty((batch, chunks, heads, P, N))
        final_BHPN = x_BTGP.new_empty((batch, heads, P, N), dtype=torch.float32)
        y_BTHP = x_BTGP.new_empty((batch, tokens, heads, P))

        seq_stride_B, seq_stride_T = (0, 0) if seq_idx_BT is None else seq_idx_BT.stride()
        block_h = min(32, triton.next_power_of_2(heads))
        decay_kernel[(chunks, triton.cdiv(heads, block_h), batch)](
            dt_BTH, A_H, seq_idx_BT, steps_BHcQ, sums_BHcQ, tokens,
            dt_BTH.stride(0), seq_stride_B, dt_BTH.stride(1), dt_BTH.stride(2), seq_stride_T,
            H=heads, FORGET=_FORGET, Q=plan.Q, BLOCK_H=block_h,
        )  # fmt: skip
        _state_pass(plan, x_BTGP, B_BTGN, steps_BHcQ, sums_BHcQ, initial_BHPN, states_BcHPN, final_BHPN, reverse=False)
        output_kernel[(triton.cdiv(P, plan.output_p) * batch * chunks * heads,)](
            x_BTGP, B_BTGN, C_BTHN, D_H, steps_BHcQ, sums_BHcQ, states_BcHPN, y_BTHP, tokens,
            x_BTGP.stride(0), B_BTGN.stride(0), C_BTHN.stride(0),
            *x_BTGP.stride()[1:3], *B_BTGN.stride()[1:3], *C_BTHN.stride()[1:3],
            H=heads, X_SHARE=heads // groups, B_SHARE=heads // B_BTGN.shape[2], C_SHARE=heads // C_BTHN.shape[2],
            P=P, N=N, RAGGED=plan.ragged, Q=plan.Q,
            BLOCK_P=plan.output_p, INNER_N=plan.inner_n,
            num_warps=4, num_stages=1, maxnreg=plan.output_registers,
        )  # fmt: skip
        ctx.save_for_backward(x_BTGP, A_H, B_BTGN, C_BTHN, D_H, steps_BHcQ, sums_BHcQ, states_BcHPN)
        ctx.plan, ctx.dt_dtype = plan, dt_BTH.dtype
        ctx.set_materialize_grads(False)
        return y_BTHP, final_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor | None, dfinal_BHPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTGP, A_H, B_BTGN, C_BTHN, D_H, steps_BHcQ, sums_BHcQ, states_BcHPN = ctx.saved_tensors
        want_x, want_dt, want_A, want_B, want_C, want_D, want_initial, _ = ctx.needs_input_grad
        plan: _Plan = ctx.plan
        batch, chunks, heads, P, N = states_BcHPN.shape
        tokens, groups = x_BTGP.shape[1:3]
        dy_BTHP = x_BTGP.new_zeros((batch, tokens, heads, P)) if dy_BTHP is None else last_adjacent(dy_BTHP)
        dstates_BcHPN = torch.empty_like(states_BcHPN)
        dinitial_BHPN = states_BcHPN.new_empty((batch, heads, P, N), dtype=torch.float32) if want_initial else None
        _state_pass(
            plan, dy_BTHP, C_BTHN, steps_BHcQ, sums_BHcQ, dfinal_BHPN, dstates_BcHPN, dinitial_BHPN, reverse=True
        )

        # The decays' gradients come from the products that make dx and dC.
        want_decay = want_dt or want_A
        dx_BTGP = x_BTGP.new_empty(x_BTGP.shape) if want_x or want_decay else None
        dB_BTGN = B_BTGN.new_empty(B_BTGN.shape) if want_B else None
        dC_BTHN = C_BTHN.new_empty(C_BTHN.shape) if want_C or want_decay or want_D else None
        blocks_p, blocks_n = triton.cdiv(P, plan.gradient_p), triton.cdiv(N, plan.gradient_n)
        inner, direct, enter, diagonal = steps_BHcQ.new_empty((4, blocks_n, *steps_BHcQ.shape))
        leave = steps_BHcQ.new_empty((blocks_p, *steps_BHcQ.shape))
        slots = (
            blocks_p * (dx_BTGP is not None)
            + blocks_n * (dB_BTGN is not None)
            + blocks_n * (heads // groups) * (dC_BTHN is not None)
        )
        if slots:
            gradient_kernel[(slots * batch * chunks * groups,)](
                x_BTGP, B_BTGN, C_BTHN, D_H, steps_BHcQ, sums_BHcQ, states_BcHPN, dy_BTHP, dstates_BcHPN,
                dx_BTGP, dB_BTGN, dC_BTHN, inner, direct, leave, enter, diagonal, tokens,
                x_BTGP.stride(0), B_BTGN.stride(0), C_BTHN.stride(0), dy_BTHP.stride(0),
                *x_BTGP.stride()[1:3], *B_BTGN.stride()[1:3], *C_BTHN.stride()[1:3], *dy_BTHP.stride()[1:3],
                H=heads, R=heads // groups, P=P, N=N, RAGGED=plan.ragged, Q=plan.Q,
                BLOCK_P=plan.gradient_p, BLOCK_N=plan.gradient_n, INNER_P=plan.inner_p, INNER_N=plan.inner_n,
                num_warps=4, num_stages=1, maxnreg=plan.gradient_registers,
            )  # fmt: skip
        ddt_BTH = dA_H = dD_H = None
        if want_decay:
            ddt_BTH = steps_BHcQ.new_empty((batch, tokens, heads))
            shares_2ZH = steps_BHcQ.new_empty((2, batch * chunks, heads))  # Z: chunks of all rows
            block_h = min(16, triton.next_power_of_2(heads))
            decay_gradient_kernel[(chunks, triton.cdiv(heads, block_h), batch)](
                A_H, steps_BHcQ, inner, direct, leave, enter, diagonal, ddt_BTH, shares_2ZH, tokens,
                H=heads, BLOCKS_P=blocks_p, BLOCKS_N=blocks_n, Q=plan.Q, BLOCK_H=block_h,
            )  # fmt: skip
            dA_H, dD_H = shares_2ZH.sum(1)
            ddt_BTH = ddt_BTH.to(ctx.dt_dtype)
        elif want_D:
            dD_H = diagonal.sum((0, 1, 3, 4))
        return (
            dx_BTGP if want_x else None,
            ddt_BTH if want_dt else None,
            dA_H if want_A else None,
            dB_BTGN,
            dC_BTHN if want_C else None,
            dD_H if want_D else None,
            dinitial_BHPN,
            None,
        )


_scan: Callable[..., tuple[Tensor, Tensor]] = _Scan.apply


def _state_pass(
    plan: _Plan,
    left_BTXP: Tensor,
    right_BTXN: Tensor,
    steps_BHcQ: Tensor,
    sums_BHcQ: Tensor,
    first_BHPN: Tensor | None,
    states_BcHPN: Tensor,
    last_BHPN: Tensor | None,
    *,
    reverse: bool,
) -> None:
    """Forward over x and B, in reverse over dy and C; fills ``states`` and ``last``. X: as many heads as each has."""
    batch, _, heads, P, N = states_BcHPN.shape
    state_kernel[(triton.cdiv(P, plan.state_p) * triton.cdiv(N, plan.state_n) * batch * heads,)](
        left_BTXP, right_BTXN, steps_BHcQ, sums_BHcQ, None if first_BHPN is None else first_BHPN.contiguous(),
        states_BcHPN, last_BHPN, left_BTXP.shape[1],
        left_BTXP.stride(0), right_BTXN.stride(0), *left_BTXP.stride()[1:3], *right_BTXN.stride()[1:3],
        H=heads, LEFT_SHARE=heads // left_BTXP.shape[2], RIGHT_SHARE=heads // right_BTXN.shape[2],
        P=P, N=N, RAGGED=plan.ragged, REVERSE=reverse, Q=plan.Q,
        BLOCK_P=plan.state_p, BLOCK_N=plan.state_n, STAGES=3, num_warps=4,
    )  # fmt: skip
