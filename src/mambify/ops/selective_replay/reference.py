"""Replay for Mamba1 in pure torch: the recurrence itself, over the pending tokens and then the new ones.

Letters: S rows, T new tokens, R places of a ring, J = G·Q·U sub-heads, G key/value heads, M channels a sub-head, N
state size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype
from mambify.ops.ring import RingPlace, is_all_false, read_ring, write_ring


def selective_replay(
    x_STJM: Tensor,
    dt_STJM: Tensor,
    A_JMN: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    D_JM: Tensor | None,
    dt_bias_JM: Tensor | None,
    z_STJM: Tensor | None,
    state_SJMN: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    place: RingPlace,
) -> Tensor:
    """See :func:`mambify.ops.selective_replay.selective_replay`."""
    T = x_STJM.shape[1]
    exact = accumulation_dtype(x_STJM, dt_STJM, state_SJMN)
    delta_STJM = dt_STJM.to(exact)
    if dt_bias_JM is not None:
        delta_STJM = torch.nn.functional.softplus(delta_STJM + dt_bias_JM.to(exact))
    now_SJMN = _after_pending(state_SJMN.to(exact), A_JMN, ring, place)
    folds_S = place.active_S & (place.pending_S > place.folds_above(T))
    _keep(state_SJMN, now_SJMN, folds_S)

    outputs = []
    for t in range(T):
        x_SJM = x_STJM[:, t].to(exact)
        now_SJMN = _step(now_SJMN, x_SJM, delta_STJM[:, t], A_JMN, B_STGUN[:, t])
        y_SJM = (now_SJMN @ C_STJN[:, t].to(exact).unsqueeze(-1)).squeeze(-1)
        outputs.append(y_SJM if D_JM is None else y_SJM + D_JM.to(exact) * x_SJM)
    for part, new in zip(ring, (x_STJM, B_STGUN, delta_STJM), strict=True):
        write_ring(part, new, place)
    y_STJM = torch.stack(outputs, dim=1)
    if z_STJM is not None:
        y_STJM = y_STJM * torch.nn.functional.silu(z_STJM.to(exact))
    return y_STJM.to(x_STJM.dtype).masked_fill(~place.active_S[:, None, None, None], 0)


def selective_fold(state_LSJMN: Tensor, A_LJMN: Tensor, ring: tuple[Tensor, Tensor, Tensor], place: RingPlace) -> None:
    """See :func:`mambify.ops.selective_replay.selective_fold`."""
    folds_S = place.active_S & (place.pending_S > 0)
    for state_SJMN, A_JMN, *parts in zip(state_LSJMN, A_LJMN, *ring, strict=True):
        _keep(state_SJMN, _after_pending(state_SJMN, A_JMN, parts, place), folds_S)


def _keep(state_SJMN: Tensor, now_SJMN: Tensor, folds_S: Tensor) -> None:
    if not is_all_false(folds_S):
        state_SJMN.copy_(torch.where(folds_S[:, None, None, None], now_SJMN.to(state_SJMN.dtype), state_SJMN))


def _after_pending(state_SJMN: Tensor, A_JMN: Tensor, ring: Sequence[Tensor], place: RingPlace) -> Tensor:
    """The states after each row's pending tokens; a token that is not one has Δ = 0, x = 0 and B = 0."""
    at_SR, known_SR = place.pending_places()
    x_SRJM, B_SRGUN, delta_SRJM = (read_ring(part, at_SR, known_SR) for part in ring)
    for entry in range(place.capacity):
        if is_all_false(known_SR[:, entry]):
            break
        state_SJMN = _step(
            state_SJMN, x_SRJM[:, entry].to(state_SJMN.dtype), delta_SRJM[:, entry], A_JMN, B_SRGUN[:, entry]
        )
    return state_SJMN


def _step(state_SJMN: Tensor, x_SJM: Tensor, delta_SJM: Tensor, A_JMN: Tensor, B_SGUN: Tensor) -> Tensor:
    exact, (G, U, N) = state_SJMN.dtype, B_SGUN.shape[1:]
    delta_SJM = delta_SJM.to(exact)
    written_SGQUM = (delta_SJM * x_SJM).unflatten(1, (G, -1, U))
    write_SGQUMN = written_SGQUM.unsqueeze(-1) * B_SGUN.to(exact).view(-1, G, 1, U, 1, N)
    decay_SJMN = (delta_SJM.unsqueeze(-1) * A_JMN.to(exact)).exp()
    return torch.addcmul(write_SGQUMN.flatten(1, 3), decay_SJMN, state_SJMN)
