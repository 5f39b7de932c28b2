"""What layers of the fused step do between their products on a CPU, in few operations of PyTorch.

A CPU is told one operation after another, and each takes its time however small it is: for a model of a hundred
million parameters the operations of :mod:`mambify.ops` that are written for clarity (their references, with all their
checks and views) take as long as reading the weights. Here the host knows where every slot stands (on a CPU looking
waits for nothing), so places are found once a read for all layers, a window of pending and new tokens is as long as
it must be, and nothing is masked where nothing is hidden. What is computed is what :mod:`mambify.ops.conv_replay`,
:mod:`mambify.ops.ssd_replay` and :mod:`mambify.ops.gated_norm`, or :mod:`mambify.ops.rotate_kv` and
:mod:`mambify.ops.decode_attention` compute.

Letters: S slots, T tokens read at once, M = S·T rows, H = G·Q query heads, G key/value heads, P head dimension, N state
size, K width and C channels of the convolution, R places of a ring, W = pending + T tokens of a window, L length of a
buffer, n the part of it that is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.mixers import AttentionMixer, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.norm import RMSNorm, rms_norm_of_few
from mambify.ops.mamba2_step import Mamba2Weights
from mambify.ops.ring import RingPlace
from mambify.ops.ssd_replay import SSDRing
from mambify.ops.ssd_replay.reference import fold_pending


@dataclass(frozen=True)
class RingPlan:
    """Where all recurrent layers find and leave what they need in one read. Rings are seen as ``[S·R, …]``.

    Attributes:
        new_M: places of the new tokens.
        window_X: places of the windows, slot by slot, S·W.
        conv_X: places of the convolution's inputs, slot by slot, S·(K − 1 + T).
        known_SW1: 0 for what is not pending; ``None`` where all of every window is.
        hidden_TW: minus infinity for tokens that come after; ``None`` for one new token.
        folds_S: slots whose pending tokens are to go into the state; ``None`` for none.
    """

    new_M: Tensor
    window_X: Tensor
    conv_X: Tensor
    known_SW1: Tensor | None
    hidden_TW: Tensor | None
    folds_S: Tensor | None

    @classmethod
    def of(cls, place: RingPlace, tokens: int, width: int) -> RingPlan:
        """For reading ``tokens`` into every slot; ``width`` is K."""
        R, T = place.capacity, tokens
        pending: list[int] = place.pending_S.tolist()
        most = max(pending)
        first_S1 = place.head_S[:, None] - max(most, width - 1)
        row_S1 = R * torch.arange(len(pending))[:, None]
        at_SX = (first_S1 + torch.arange(max(most, width - 1) + T)).remainder_(R).add_(row_S1)
        uneven = min(pending) < most
        folds = any(count > place.folds_above(T) for count in pending)
        return cls(
            new_M=at_SX[:, -T:].flatten(),
            window_X=at_SX[:, -most - T :].flatten(),
            conv_X=at_SX[:, 1 - width - T :].flatten(),
            known_SW1=(torch.arange(most + T) >= most - place.pending_S[:, None])[..., None] if uneven else None,
            hidden_TW=torch.full((T, most + T), -torch.inf).triu_(most + 1) if T > 1 else None,
            folds_S=place.pending_S > place.folds_above(T) if folds else None,
        )


class Mamba2Middle:
    """A Mamba2 mixer between its projections, for tokens that may yet be rejected; every slot takes part."""

    def __init__(self, mixer: Mamba2Mixer, state: ReplayState, ring: SSDRing, weights: Mamba2Weights) -> None:
        self._state_SHPN, self._ring, self._weights = state.ssm, ring, weights
        self._sizes = mixer.num_heads, mixer.num_groups, mixer.head_dim, mixer.state_size
        self.width = weights.conv_CK.shape[1]
        self._conv_split = mixer.conv_split
        self._conv = state.conv.flatten(0, 1)
        self._x, self._B, self._delta = (part.flatten(0, 1) for part in ring)
        self._no_bias_C = torch.zeros(sum(mixer.conv_split))

    def __call__(self, zxBCdt_STE: Tensor, plan: RingPlan) -> Tensor:
        """``[S·T, H·P]``."""
        H, G, P, N = self._sizes
        S, T, _ = zxBCdt_STE.shape
        z_STI, xBC_STC, dt_STH = zxBCdt_STE.split([H * P, sum(self._conv_split), H], dim=-1)
        x_STI, B_STI, C_STI = self._convolve(xBC_STC, plan).split(self._conv_split, dim=-1)
        self._x.index_copy_(0, plan.new_M, x_STI.reshape(S * T, G, P).to(self._x.dtype))
        self._B.index_copy_(0, plan.new_M, B_STI.reshape(S * T, G, N).to(self._B.dtype))
        delta_STH = F.softplus(dt_STH.float() + self._weights.dt_bias_H)
        self._delta.index_copy_(0, plan.new_M, delta_STH.flatten(0, 1))

        x_SWGP, B_SWGN, delta_SWH = (
            part.index_select(0, plan.window_X).unflatten(0, (S, -1)).float()
            for part in (self._x, self._B, self._delta)
        )
        if plan.known_SW1 is not None:
            delta_SWH = delta_SWH * plan.known_SW1
        W = x_SWGP.shape[1]
        decay_SHW = (delta_SWH * self._weights.A_H).mT.cumsum(2, dtype=torch.float64)
        enter_SHT = decay_SHW[..., W - T :]
        gap_SHTW = enter_SHT[..., None] - decay_SHW[:, :, None]
        if plan.hidden_TW is not None:
            gap_SHTW += plan.hidden_TW
        weight_SHTW = gap_SHTW.exp_().to(torch.float32).mul_(delta_SWH.mT[:, :, None])

        # All query heads of a key/value head side by side: N of them a batch of matrix products.
        C_SGQTN = C_STI.float().view(S, T, G, H // G, N).permute(0, 2, 3, 1, 4)
        C_GMN = C_SGQTN.reshape(S * G, -1, N)
        score_GMW = torch.bmm(C_GMN, B_SWGN.permute(0, 2, 3, 1).reshape(S * G, N, W))
        score_GMW.mul_(weight_SHTW.view(S * G, -1, W))
        x_SGWP = x_SWGP.transpose(1, 2)
        y_GMP = torch.bmm(score_GMW, x_SGWP.reshape(S * G, W, P))
        y_SHTP = y_GMP.view(S, H, T, P)
        carried_HTP = torch.bmm(C_GMN.reshape(S * H, T, N), self._state_SHPN.view(S * H, P, N).mT)
        y_SHTP.addcmul_(carried_HTP.view(S, H, T, P), enter_SHT.exp().to(torch.float32)[..., None])
        y_SGQTP = y_SHTP.view(S, G, -1, T, P)
        y_SGQTP.addcmul_(self._weights.D_H.view(G, -1, 1, 1), x_SGWP[:, :, None, W - T :])
        if plan.folds_S is not None:
            pending = x_SWGP[:, : W - T], B_SWGN[:, : W - T], delta_SWH[:, : W - T]
            fold_pending(self._state_SHPN, self._weights.A_H, pending, plan.folds_S)

        gated_STHP = F.silu(z_STI.float()).view(S, T, H, P).mul_(y_SHTP.transpose(1, 2))
        normed_STHP = rms_norm_of_few(gated_STHP, self._weights.norm_HP, self._weights.eps)
        return normed_STHP.to(zxBCdt_STE.dtype).view(S * T, H * P)

    def _convolve(self, x_STC: Tensor, plan: RingPlan) -> Tensor:
        S, T, C = x_STC.shape
        self._conv.index_copy_(0, plan.new_M, x_STC.reshape(S * T, C))
        x_SXC = self._conv.index_select(0, plan.conv_X).view(S, -1, C).float()
        first_C, *taps = self._weights.conv_CK.float().unbind(1)  # not kept: in training weights change where they lie
        bias_C = self._weights.conv_bias_C
        y_STC = torch.addcmul(self._no_bias_C if bias_C is None else bias_C.float(), x_SXC[:, :T], first_C)
        for k, tap_C in enumerate(taps, start=1):
            y_STC.addcmul_(x_SXC[:, k : k + T], tap_C)
        return F.silu(y_STC).to(x_STC.dtype)


@dataclass(frozen=True)
class KVPlan:
    """Where all attention layers of one kind write and look in one read.

    Attributes:
        start: where every slot's new tokens go, if it is the same for all; else ``place_ST`` says.
        place_ST: of the new tokens.
        end: n: no slot holds more.
        seen: places from the beginning that every query sees.
        hidden_SMn: added to the scores of the rest, of M = Q·T queries a key/value head (query heads first); minus
            infinity where a token is not seen; ``None`` where all are.
        cos_ST1P, sin_ST1P: of the new tokens' angles; the sine's first half is negative.
    """

    start: int | None
    place_ST: Tensor
    end: int
    seen: int
    hidden_SMn: Tensor | None
    cos_ST1P: Tensor
    sin_ST1P: Tensor

    @classmethod
    def of(
        cls, lengths_S: Tensor, tokens: int, queries: int, window: int | None, table: tuple[Tensor, Tensor]
    ) -> KVPlan:
        """For reading ``tokens`` into slots that hold ``lengths``; ``queries`` is Q, ``table`` ``[L, P/2]`` each."""
        lengths: list[int] = lengths_S.tolist()
        place_ST = lengths_S[:, None] + torch.arange(tokens)
        even = min(lengths) == max(lengths)
        end, seen = max(lengths) + tokens, min(lengths) + 1
        if window is not None and end > window:
            seen = 0
        hidden_SMn = None
        if seen < end:
            at_n = torch.arange(seen, end)
            unseen_STn = at_n > place_ST[..., None]
            if window is not None:
                unseen_STn |= at_n <= place_ST[..., None] - window
            hidden_STn = torch.zeros(unseen_STn.shape, dtype=table[0].dtype).masked_fill_(unseen_STn, -torch.inf)
            hidden_SMn = hidden_STn[:, None].expand(-1, queries, -1, -1).flatten(1, 2)
        cos_STJ, sin_STJ = (part_LJ[place_ST] for part_LJ in table)
        cos_ST1P, sin_ST1P = torch.cat([cos_STJ, cos_STJ], -1), torch.cat([-sin_STJ, sin_STJ], -1)
        start = lengths[0] if even else None
        return cls(start, place_ST, end, seen, hidden_SMn, cos_ST1P[:, :, None], sin_ST1P[:, :, None])


class ReadPlans:
    """The plans of one read, each made when the first layer asks for it."""

    def __init__(self, place: RingPlace, lengths_S: Tensor, tokens: int) -> None:
        self._place, self._lengths_S, self._tokens = place, lengths_S, tokens
        self._ring: RingPlan | None = None
        self._kv: dict[tuple[int, int | None], KVPlan] = {}

    @cached_property
    def all_active(self) -> bool:
        """Whether every slot takes part."""
        return bool(self._place.active_S.all())

    def ring(self, width: int) -> RingPlan:
        """``width``: K, the same for all layers."""
        if self._ring is None:
            self._ring = RingPlan.of(self._place, self._tokens, width)
        return self._ring

    def kv(self, queries: int, window: int | None, table: tuple[Tensor, Tensor]) -> KVPlan:
        """See :meth:`KVPlan.of`."""
        found = self._kv.get((queries, window))
        if found is None:
            found = self._kv[queries, window] = KVPlan.of(self._lengths_S, self._tokens, queries, window, table)
        return found


class AttentionMiddle:
    """An attention mixer between its projections."""

    def __init__(self, mixer: AttentionMixer, state: SlotKV) -> None:
        self._keys_SGLP, self._values_SGLP = state.keys_SGLP, state.values_SGLP
        self._scaling = float(mixer.attend.scaling)
        self._norms = mixer.q_norm, mixer.k_norm

    def __call__(self, qkv_STE: Tensor, plan: KVPlan) -> Tensor:
        """``[S·T, H·P]``."""
        S, G, _, P = self._keys_SGLP.shape
        T = qkv_STE.shape[1]
        qkv_STXP = qkv_STE.unflatten(2, (-1, P))
        H = qkv_STXP.shape[2] - 2 * G
        qk_STXP = self._normed(qkv_STXP[:, :, : H + G], H)
        turned_STXP = torch.cat([qk_STXP[..., P // 2 :], qk_STXP[..., : P // 2]], -1)
        qk_STXP = (qk_STXP * plan.cos_ST1P).addcmul_(turned_STXP, plan.sin_ST1P)
        self._write(self._keys_SGLP, qk_STXP[:, :, H:], plan)
        self._write(self._values_SGLP, qkv_STXP[:, :, H + G :], plan)

        q_GMP = qk_STXP[:, :, :H].unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).reshape(S * G, -1, P)
        keys_GnP, values_GnP = (
            buffer[:, :, : plan.end].flatten(0, 1) for buffer in (self._keys_SGLP, self._values_SGLP)
        )
        scores_GMn = torch.bmm(q_GMP, keys_GnP.mT).float().mul_(self._scaling)
        if plan.hidden_SMn is not None:
            scores_GMn.unflatten(0, (S, G))[..., plan.seen :].add_(plan.hidden_SMn[:, None])
        y_GMP = torch.bmm(scores_GMn.softmax(-1).to(values_GnP.dtype), values_GnP)
        return y_GMP.view(S, H, T, P).transpose(1, 2).reshape(S * T, H * P)

    def _normed(self, qk_STXP: Tensor, heads: int) -> Tensor:
        q_norm, k_norm = self._norms
        if not (isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm)):
            return qk_STXP
        return torch.cat([q_norm(qk_STXP[:, :, :heads]), k_norm(qk_STXP[:, :, heads:])], 2)

    def _write(self, buffer_SGLP: Tensor, new_STGP: Tensor, plan: KVPlan) -> None:
        if plan.start is not None:
            buffer_SGLP[:, :, plan.start : plan.end] = new_STGP.transpose(1, 2)
        else:
            buffer_SGLP[torch.arange(len(new_STGP))[:, None], :, plan.place_ST] = new_STGP
