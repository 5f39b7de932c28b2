"""The two other ways to verify tokens with Mamba2, as Triton kernels: a state stored a token, and copy and recompute.

Both step through the tokens with the state in registers. Where every token's state is stored (as vLLM does), the next
round begins from the one that was accepted last: one read and T writes a round. Where a copy is kept, the tokens are
stepped through on the copy and the accepted ones again on the state: three reads and three writes.

Letters: S rows, T tokens, H query heads, G key/value heads, P head dimension, N state size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_P = 16  # channels a program: a few states of 8 kB each are under way in every multiprocessor


class StatePerToken:
    """Buffers ``[S, T + 1, H, P, N]`` of which the last place holds the state that the round begins from."""

    def __init__(self, state_SHPN: Tensor, new: int) -> None:
        self.states = state_SHPN.new_empty((len(state_SHPN), new + 1, *state_SHPN.shape[1:]))
        self.states[:, new] = state_SHPN
        self.first_S = torch.full((len(state_SHPN),), new, device=state_SHPN.device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        y_STHP = torch.empty_like(inputs["C"][..., : inputs["x"].shape[-1]])
        _launch(inputs, self.states, self.states, self.first_S, None, y_STHP)
        return y_STHP


class CopyAndRecompute:
    """A scratch copy for the verification; ``accepted`` tokens of each row are recomputed."""

    def __init__(self, state_SHPN: Tensor, accepted: int) -> None:
        self.scratch, self.kept = (torch.empty_like(state_SHPN)[:, None] for _ in range(2))
        self.accepted_S = torch.full((len(state_SHPN),), accepted, device=state_SHPN.device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        y_STHP = torch.empty_like(inputs["C"][..., : inputs["x"].shape[-1]])
        self.scratch.copy_(inputs["state"][:, None])
        _launch(inputs, self.scratch, self.scratch, None, None, y_STHP)
        # Into a third buffer, so that every run does the same.
        _launch(inputs, inputs["state"][:, None], self.kept, None, self.accepted_S, None)
        return y_STHP


def _launch(
    inputs: Mapping[str, Tensor],
    source: Tensor,
    target: Tensor,
    first_S: Tensor | None,
    count_S: Tensor | None,
    y_STHP: Tensor | None,
) -> None:
    x, C = inputs["x"], inputs["C"]
    slots, new, groups, P = x.shape
    heads, N = C.shape[2:]
    _steps[(heads * triton.cdiv(P, _BLOCK_P), slots)](
        x, inputs["dt"], inputs["A"], inputs["B"], C, inputs["D"], source, target, first_S, count_S, y_STHP,
        H=heads, G=groups, P=P, N=N, T=new, PLACES=source.shape[1], EACH=target.shape[1] > 1,
        BLOCK_P=_BLOCK_P, BLOCK_N=triton.next_power_of_2(N), num_warps=4,
    )  # fmt: skip


@triton.jit
def _steps(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, source_ptr, target_ptr, first_ptr, count_ptr, y_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, PLACES: tl.constexpr,
    EACH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From place ``first`` of the source (or 0), over ``count`` tokens (or all); EACH: stores every state."""
    row, blocks = tl.program_id(1).to(tl.int64), (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0) // blocks
    g = h // (H // G)
    p, n = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    tile, here = (h * P + p[:, None]) * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    first, count = 0, T
    if first_ptr is not None:
        first = tl.load(first_ptr + row)
    if count_ptr is not None:
        count = tl.load(count_ptr + row)
    A, D = tl.load(A_ptr + h), tl.load(D_ptr + h)
    s = tl.load(source_ptr + (row * PLACES + first) * H * P * N + tile, mask=here, other=0.0)
    for t in range(count):
        token = row * T + t
        dt = tl.load(dt_ptr + token * H + h)
        x = tl.load(x_ptr + (token * G + g) * P + p, mask=p < P, other=0.0).to(tl.float32)
        B = tl.load(B_ptr + (token * G + g) * N + n, mask=n < N, other=0.0).to(tl.float32)
        s = tl.exp(A * dt) * s + (dt * x)[:, None] * B[None, :]
        if y_ptr is not None:
            C = tl.load(C_ptr + (token * H + h) * N + n, mask=n < N, other=0.0).to(tl.float32)
            y = tl.sum(s * C[None, :], 1) + D * x
            tl.store(y_ptr + (token * H + h) * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
        if EACH:
            tl.store(target_ptr + (row * PLACES + t) * H * P * N + tile, s, mask=here)
    if not EACH:
        tl.store(target_ptr + row * H * P * N + tile, s, mask=here)
