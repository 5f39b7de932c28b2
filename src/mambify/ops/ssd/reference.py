"""Mamba2's scan in pure torch: matrix products inside chunks of Q tokens, a state passed from chunk to chunk.

Letters: B batch, T tokens, H = G·R query heads, G key/value heads, R query heads a key/value head, P head
dimension, N state size; c chunks, Q tokens a chunk. Folded for the products: Z = B·c·G, Y = B·c·H, S = R·Q,
L = R·P.

With c_t the running sum of A Δ inside a chunk and S_0 the state that enters it,

    y_t = e^{c_t} S_0 C_t + Σ_{s≤t} e^{c_t−c_s} Δ_s (B_s·C_t) x_s + D x_t
    S_Q = e^{c_Q} S_0     + Σ_s     e^{c_Q−c_s} Δ_s x_s B_sᵀ

Every exponent is ≤ 0: pairs s > t are masked before the exponential. Running sums are float64, so that
c_t − c_s is right to float32 even after a token that decays by e^{-10000}. The gradient is written out by
hand: autograd would go over the Q×Q matrices about twice as often, and keep more of them. Heads that are grouped
otherwise are repeated first (ops/head_groups.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import accumulation_dtype, documents
from mambify.ops.head_groups import as_key_values


class _Decays(NamedTuple):
    """Decays of every chunk, all in (0, 1], zero across a document boundary."""

    pair_BcHQQ: Tensor  # from token s (last axis) to token t, 0 for s > t
    enter_BcHQ: Tensor  # of the entering state, at token t
    leave_BcHQ: Tensor  # of token s, at the end of the chunk
    whole_BcH: Tensor  # of the entering state, at the end of the chunk


def ssd_scan(
    x_BTGP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTHN: Tensor,
    D_H: Tensor | None,
    initial_state_BHPN: Tensor | None,
    seq_idx_BT: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.ssd.ssd_scan`."""
    x_BTGP, B_BTGN, C_BTHN = as_key_values(x_BTGP, B_BTGN, C_BTHN, dt_BTH.shape[2])
    exact = accumulation_dtype(x_BTGP, dt_BTH, B_BTGN, C_BTHN, initial_state_BHPN)
    work = torch.promote_types(torch.promote_types(x_BTGP.dtype, B_BTGN.dtype), C_BTHN.dtype)
    if initial_state_BHPN is None:
        initial_state_BHPN = x_BTGP.new_zeros(
            (x_BTGP.shape[0], C_BTHN.shape[2], x_BTGP.shape[3], C_BTHN.shape[3]), dtype=exact
        )
    D_H = x_BTGP.new_zeros(C_BTHN.shape[2], dtype=exact) if D_H is None else D_H
    y_BTHP, final_BHPN = _scan(
        x_BTGP.to(work),
        dt_BTH.to(exact),
        A_H.to(exact),
        B_BTGN.to(work),
        C_BTHN.to(work),
        D_H.to(exact),
        initial_state_BHPN.to(exact),
        None if seq_idx_BT is None else documents(seq_idx_BT),
        chunk_size,
    )
    return y_BTHP.to(x_BTGP.dtype), final_BHPN


def ssd_step(
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.ssd.ssd_step`."""
    x_BGP, B_BGN, C_BHN = as_key_values(x_BGP, B_BGN, C_BHN, dt_BH.shape[1])
    groups, heads = x_BGP.shape[1], C_BHN.shape[1]
    exact = accumulation_dtype(x_BGP, dt_BH, B_BGN, C_BHN, state_BHPN)
    dt_BGR = dt_BH.to(exact).unflatten(1, (groups, heads // groups))
    decay_BGR = torch.exp(dt_BGR * A_H.to(exact).view(groups, -1))
    x_BG1P, B_BG1N = x_BGP.to(exact).unsqueeze(2), B_BGN.to(exact).unsqueeze(2)
    write_BGRPN = (dt_BGR.unsqueeze(-1) * x_BG1P).unsqueeze(-1) * B_BG1N.unsqueeze(-2)
    state_BGRPN = state_BHPN.to(exact).unflatten(1, (groups, -1))
    state_BGRPN = torch.addcmul(write_BGRPN, decay_BGR[..., None, None], state_BGRPN)
    y_BGRP = (state_BGRPN * C_BHN.to(exact).unflatten(1, (groups, -1)).unsqueeze(-2)).sum(dim=-1)
    if D_H is not None:
        y_BGRP = y_BGRP + D_H.to(exact).view(groups, -1, 1) * x_BG1P
    return y_BGRP.flatten(1, 2).to(x_BGP.dtype), state_BGRPN.flatten(1, 2).to(state_BHPN.dtype)


def _chunked(x_BTXL: Tensor, chunk_size: int) -> Tensor:
    """[B, T, X, L] → [B, c, X, Q, L], contiguous, zero after the last token."""
    padding = -x_BTXL.shape[1] % chunk_size
    if padding:
        x_BTXL = torch.nn.functional.pad(x_BTXL, (0, 0, 0, 0, 0, padding))
    x_BcQXL: Tensor = x_BTXL.unflatten(1, (-1, chunk_size))
    return x_BcQXL.transpose(2, 3).contiguous()


def _unchunked(x_BcXQL: Tensor, tokens: int) -> Tensor:
    """The inverse of :func:`_chunked`."""
    return x_BcXQL.transpose(2, 3).flatten(1, 2)[:, :tokens].contiguous()


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of running sums: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _decays(rate_BcHQ: Tensor, documents_BT: Tensor | None) -> _Decays:
    """Decays from A Δ at each token; ``documents_BT`` counts documents along a row."""
    chunk_size, exact = rate_BcHQ.shape[-1], rate_BcHQ.dtype
    sum_BcHQ = rate_BcHQ.cumsum(dim=-1, dtype=_wide(rate_BcHQ.device))
    pair_BcHQQ = rate_BcHQ.new_empty((*rate_BcHQ.shape, chunk_size))
    torch.sub(sum_BcHQ.unsqueeze(-1), sum_BcHQ.unsqueeze(-2), out=pair_BcHQQ)
    future_QQ = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=rate_BcHQ.device).triu_(1)
    enter_BcHQ = sum_BcHQ.to(exact).exp()
    leave_BcHQ = (sum_BcHQ[..., -1:] - sum_BcHQ).to(exact).exp()
    whole_BcH = enter_BcHQ[..., -1].contiguous()
    if documents_BT is None:
        pair_BcHQQ.masked_fill_(future_QQ, -torch.inf).exp_()
        return _Decays(pair_BcHQQ, enter_BcHQ, leave_BcHQ, whole_BcH)
    padding = -documents_BT.shape[1] % chunk_size
    last_B1 = documents_BT[:, -1:]
    own_BcQ = torch.cat([documents_BT, last_B1.expand(-1, padding)], dim=1).unflatten(1, (-1, chunk_size))
    end_Bc1 = own_BcQ[..., -1:]
    before_Bc1 = torch.cat([own_BcQ[:, :1, :1], end_Bc1[:, :-1]], dim=1)
    apart_BcQQ = (own_BcQ.unsqueeze(-1) != own_BcQ.unsqueeze(-2)) | future_QQ
    pair_BcHQQ.masked_fill_(apart_BcQQ.unsqueeze(2), -torch.inf).exp_()
    enter_BcHQ.masked_fill_((own_BcQ != before_Bc1).unsqueeze(2), 0.0)
    leave_BcHQ.masked_fill_((own_BcQ != end_Bc1).unsqueeze(2), 0.0)
    whole_BcH.masked_fill_(end_Bc1 != before_Bc1, 0.0)
    return _Decays(pair_BcHQQ, enter_BcHQ, leave_BcHQ, whole_BcH)


class _Scan(torch.autograd.Function):
    """The chunked scan and its gradient, chunk by chunk as in the equations at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTGP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTHN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor,
        documents_BT: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_BTGP.device.type, enabled=False):
            work, tokens = x_BTGP.dtype, x_BTGP.shape[1]
            x_BcGQP, B_BcGQN, C_BcHQN = (_chunked(v, chunk_size) for v in (x_BTGP, B_BTGN, C_BTHN))
            dt_BcHQ = _chunked(dt_BTH.unsqueeze(-1), chunk_size).squeeze(-1)
            batch, chunks, heads, _, state_size = C_BcHQN.shape
            head_dim = x_BcGQP.shape[-1]
            x_ZQP, B_ZQN = x_BcGQP.flatten(0, 2), B_BcGQN.flatten(0, 2)
            decay = _decays(dt_BcHQ * A_H[:, None], documents_BT)

            # What each chunk writes, then the state each chunk starts from.
            write_ZQR1 = (dt_BcHQ * decay.leave_BcHQ).view(len(x_ZQP), -1, chunk_size).mT.unsqueeze(-1)
            written_ZQL = (write_ZQR1 * x_ZQP.unsqueeze(2)).to(work).flatten(2)  # L = R·P
            added_BcHPN = torch.bmm(written_ZQL.mT, B_ZQN).view(batch, chunks, heads, head_dim, state_size)
            state_BHPN = initial_BHPN
            states_BcHPN = torch.empty_like(added_BcHPN, dtype=initial_BHPN.dtype)
            for c in range(chunks):
                states_BcHPN[:, c] = state_BHPN
                state_BHPN = torch.addcmul(
                    added_BcHPN[:, c].to(state_BHPN.dtype), decay.whole_BcH[:, c, :, None, None], state_BHPN
                )

            # Attention inside the chunk, with the skip D on its diagonal; then the entering state's share.
            score_ZSQ = torch.bmm(C_BcHQN.view(len(x_ZQP), -1, state_size), B_ZQN.mT)  # S = R·Q
            mix_BcHQQ = decay.pair_BcHQQ * score_ZSQ.view_as(decay.pair_BcHQQ)
            mix_BcHQQ.mul_(dt_BcHQ.unsqueeze(-2))
            mix_BcHQQ.diagonal(dim1=-2, dim2=-1).add_(D_H[:, None])
            mix_ZSQ = mix_BcHQQ.to(work).view_as(score_ZSQ)
            read_YQN = (C_BcHQN * decay.enter_BcHQ.unsqueeze(-1)).to(work).flatten(0, 2)
            y_YQP = torch.bmm(mix_ZSQ, x_ZQP).view(-1, chunk_size, head_dim)
            y_YQP.baddbmm_(read_YQN, states_BcHPN.to(work).flatten(0, 2).mT)
            ctx.save_for_backward(
                x_BcGQP,
                B_BcGQN,
                C_BcHQN,
                dt_BcHQ,
                A_H,
                states_BcHPN,
                score_ZSQ,
                mix_ZSQ,
                read_YQN,
                written_ZQL,
                *decay,
            )
            ctx.tokens = tokens
            return _unchunked(y_YQP.view(batch, chunks, heads, chunk_size, head_dim), tokens), state_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x_BcGQP, B_BcGQN, C_BcHQN, dt_BcHQ, A_H, states_BcHPN, score_ZSQ, mix_ZSQ, *rest = ctx.saved_tensors
        read_YQN, written_ZQL, *decays = rest
        decay, tokens = _Decays(*decays), ctx.tokens
        work, exact, wide = x_BcGQP.dtype, dt_BcHQ.dtype, _wide(dy_BTHP.device)
        with torch.autocast(dy_BTHP.device.type, enabled=False):
            chunks, chunk_size = dt_BcHQ.shape[1], dt_BcHQ.shape[-1]
            x_ZQP, B_ZQN, states_YPN = (v.flatten(0, 2) for v in (x_BcGQP, B_BcGQN, states_BcHPN.to(work)))
            batches, head_dim, state_size = len(x_ZQP), x_ZQP.shape[-1], B_ZQN.shape[-1]
            dy_BcHQP = _chunked(dy_BTHP, chunk_size)
            dy_YQP, dy_ZSP = dy_BcHQP.flatten(0, 2), dy_BcHQP.view(batches, -1, head_dim)

            # Between chunks: the gradient of every entering state, from the last chunk to the first.
            dstates_BcHPN = torch.bmm(dy_YQP.mT, read_YQN).view_as(states_BcHPN).to(exact)
            dadded_BcHPN = torch.empty_like(dstates_BcHPN)
            dstate_BHPN = dfinal_BHPN
            for c in reversed(range(chunks)):
                dadded_BcHPN[:, c] = dstate_BHPN
                whole_BH11 = decay.whole_BcH[:, c, :, None, None]
                dstate_BHPN = torch.addcmul(dstates_BcHPN[:, c], whole_BH11, dstate_BHPN)
            dwhole_BcH = (states_BcHPN * dadded_BcHPN).sum(dim=(-2, -1))
            dadded_ZLN = dadded_BcHPN.to(work).view(batches, -1, state_size)

            # What the chunk wrote: Δ_s e^{c_Q−c_s} x_s B_sᵀ.
            dwritten_ZQRP = torch.bmm(B_ZQN, dadded_ZLN.mT).unflatten(2, (-1, head_dim))
            dB_ZQN = torch.bmm(written_ZQL, dadded_ZLN)
            write_BcHQ = dt_BcHQ * decay.leave_BcHQ
            write_ZQR = write_BcHQ.view(batches, -1, chunk_size).mT
            dx_ZQP = (dwritten_ZQRP * write_ZQR.unsqueeze(-1)).sum(dim=2).to(work)
            dwrite_ZQR = torch.matmul(dwritten_ZQRP, x_ZQP.unsqueeze(-1)).squeeze(-1).to(exact)
            dwrite_BcHQ = dwrite_ZQR.mT.reshape(dt_BcHQ.shape)

            # Inside the chunk. ``pairs`` is the gradient of Δ_s before its sum over t, then of c_t − c_s.
            dx_ZQP.baddbmm_(mix_ZSQ.mT, dy_ZSP)
            dmix_BcHQQ = torch.bmm(dy_ZSP, x_ZQP.mT).view_as(decay.pair_BcHQQ).to(exact)
            dD_H = dmix_BcHQQ.diagonal(dim1=-2, dim2=-1).sum(dim=(0, 1, 3))
            dmix_BcHQQ.mul_(decay.pair_BcHQQ)
            pairs_BcHQQ = dmix_BcHQQ * score_ZSQ.view_as(dmix_BcHQQ)
            ddt_BcHQ = pairs_BcHQQ.sum(dim=-2).addcmul_(dwrite_BcHQ, decay.leave_BcHQ)
            pairs_BcHQQ.mul_(dt_BcHQ.unsqueeze(-2))
            dscore_ZSQ = dmix_BcHQQ.mul_(dt_BcHQ.unsqueeze(-2)).to(work).view_as(score_ZSQ)
            dB_ZQN.baddbmm_(dscore_ZSQ.mT, C_BcHQN.view(batches, -1, state_size))
            dread_YQN = torch.bmm(dy_YQP, states_YPN)
            dC_BcHQN = (dread_YQN.view_as(C_BcHQN) * decay.enter_BcHQ.unsqueeze(-1)).to(work)
            dC_BcHQN.view(batches, -1, state_size).baddbmm_(dscore_ZSQ, B_ZQN)

            # The running sum c, then each token's A Δ. A pair's two shares (c_t, −c_s) cancel for every token
            # that is not between s and t; it takes float64 sums for that to come out as zero.
            leaving_BcHQ = (dwrite_BcHQ * write_BcHQ).to(wide)
            dsum_BcHQ = pairs_BcHQQ.sum(dim=-1, dtype=wide) - pairs_BcHQQ.sum(dim=-2, dtype=wide)
            dsum_BcHQ += (dread_YQN.to(exact) * read_YQN).sum(dim=-1).view_as(dsum_BcHQ)
            dsum_BcHQ -= leaving_BcHQ
            dsum_BcHQ[..., -1] += leaving_BcHQ.sum(dim=-1) + dwhole_BcH * decay.whole_BcH
            drate_BcHQ = dsum_BcHQ.flip(-1).cumsum(dim=-1).flip(-1).to(exact)
            ddt_BcHQ += drate_BcHQ * A_H[:, None]
            return (
                _unchunked(dx_ZQP.view_as(x_BcGQP), tokens),
                _unchunked(ddt_BcHQ.unsqueeze(-1), tokens).squeeze(-1),
                (drate_BcHQ * dt_BcHQ).sum(dim=(0, 1, 3)),
                _unchunked(dB_ZQN.view_as(B_BcGQN), tokens),
                _unchunked(dC_BcHQN, tokens),
                dD_H,
                dstate_BHPN,
                None,
                None,
            )


_scan: Callable[..., tuple[Tensor, Tensor]] = _Scan.apply
