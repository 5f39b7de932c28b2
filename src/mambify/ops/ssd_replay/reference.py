"""Replay for Mamba2 in pure torch.

Letters: S rows, T new tokens, R places of a ring, E = R + T tokens of a window (pending ones, then new ones), H = G·Q
query heads, G key/value heads, P head dimension, N state size.

What is not pending in the first R of a window has Δ = 0, x = 0 and B = 0: it neither decays nor writes. Heads that are
grouped otherwise are repeated once they have been read (ops/head_groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype
from mambify.ops.head_groups import as_key_values
from mambify.ops.ring import RingPlace, is_all_false, read_ring, write_ring


def ssd_replay(
    x_STGP: Tensor,
    dt_STH: Tensor,
    A_H: Tensor,
    B_STGN: Tensor,
    C_STHN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    state_SHPN: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    place: RingPlace,
) -> Tensor:
    """See :func:`mambify.ops.ssd_replay.ssd_replay`."""
    S, T = x_STGP.shape[:2]
    exact = accumulation_dtype(x_STGP, dt_STH, state_SHPN)
    delta_STH = dt_STH.to(exact)
    if dt_bias_H is not None:
        delta_STH = torch.nn.functional.softplus(delta_STH + dt_bias_H.to(exact))
    at_SR, known_SR = place.pending_places()
    pending = [read_ring(part, at_SR, known_SR) for part in ring]
    x_SEGP, B_SEGN, delta_SEH = (
        torch.cat([old.to(exact), new.to(exact)], dim=1)
        for old, new in zip(pending, (x_STGP, B_STGN, delta_STH), strict=True)
    )
    x_SEGP, B_SEGN, C_STHN = as_key_values(x_SEGP, B_SEGN, C_STHN, dt_STH.shape[2])
    G = x_SEGP.shape[2]
    decay_SEH = (delta_SEH * A_H.to(exact)).double().cumsum(1)
    enter_STH = decay_SEH[:, -T:]
    order_E = torch.arange(x_SEGP.shape[1], device=x_STGP.device)
    seen_TE = order_E <= order_E[-T:, None]
    gap_SHTE = (enter_STH.mT.unsqueeze(-1) - decay_SEH.mT.unsqueeze(-2)).masked_fill(~seen_TE, -torch.inf).to(exact)

    C_SGQTN = C_STHN.to(exact).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
    score_SGQTE = C_SGQTN @ B_SEGN.permute(0, 2, 3, 1).unsqueeze(2)
    weight_SHTE = score_SGQTE.flatten(1, 2) * gap_SHTE.exp() * delta_SEH.mT.unsqueeze(-2)
    x_SGEP = x_SEGP.transpose(1, 2)
    y_SHTP = (weight_SHTE.unflatten(1, (G, -1)) @ x_SGEP.unsqueeze(2)).flatten(1, 2)
    y_SHTP += enter_STH.mT.to(exact).exp().unsqueeze(-1) * (C_SGQTN.flatten(1, 2) @ state_SHPN.to(exact).mT)
    if D_H is not None:
        y_SHTP += (D_H.to(exact).view(G, -1, 1, 1) * x_SGEP[:, :, None, -T:]).flatten(1, 2)
    y_STHP: Tensor = y_SHTP.transpose(1, 2).to(x_STGP.dtype).masked_fill(~place.active_S.view(S, 1, 1, 1), 0)

    fold_pending(state_SHPN, A_H, pending, place.active_S & (place.pending_S > place.folds_above(T)))
    for part, new in zip(ring, (x_STGP, B_STGN, delta_STH), strict=True):
        write_ring(part, new, place)
    return y_STHP


def ssd_fold(
    state_LSHPN: Tensor,
    A_LH: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    place: RingPlace,
) -> None:
    """See :func:`mambify.ops.ssd_replay.ssd_fold`."""
    folds_S = place.active_S & (place.pending_S > 0)
    at_SR, known_SR = place.pending_places()
    for state_SHPN, A_H, *parts in zip(state_LSHPN, A_LH, *ring, strict=True):
        fold_pending(state_SHPN, A_H, [read_ring(part, at_SR, known_SR) for part in parts], folds_S)


def fold_pending(state_SHPN: Tensor, A_H: Tensor, pending: Sequence[Tensor], folds_S: Tensor) -> None:
    """Takes the states of rows ``folds_S`` over their pending tokens: x, B and Δ, zero where there is none."""
    x_SRGP, B_SRGN, delta_SRH = pending
    if is_all_false(folds_S):
        return
    x_SRGP, B_SRGN, _ = as_key_values(x_SRGP, B_SRGN, delta_SRH.unsqueeze(-1), delta_SRH.shape[2])
    exact, G = state_SHPN.dtype, x_SRGP.shape[2]
    decay_SRH = (delta_SRH.to(exact) * A_H.to(exact)).double().cumsum(1)
    whole_SH = decay_SRH[:, -1]
    weight_SRH = (whole_SH[:, None] - decay_SRH).to(exact).exp() * delta_SRH.to(exact)
    written_SGQRP = weight_SRH.mT.unflatten(1, (G, -1)).unsqueeze(-1) * x_SRGP.to(exact).transpose(1, 2).unsqueeze(2)
    added_SHPN = (written_SGQRP.mT @ B_SRGN.to(exact).transpose(1, 2).unsqueeze(2)).flatten(1, 2)
    folded_SHPN = torch.addcmul(added_SHPN, whole_SH.to(exact).exp()[..., None, None], state_SHPN)
    state_SHPN.copy_(torch.where(folds_S[:, None, None, None], folded_SHPN, state_SHPN))
