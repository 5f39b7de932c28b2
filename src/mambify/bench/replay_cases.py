"""Verification of drafted tokens in ``mambify bench ops``: replay beside the ways it replaces.

The bytes of a case are the state, read once, and what a round brings: what verification could cost at best. Rows that
fold write the state as well, and have pending tokens with Δ = 0, so that every run finds the state as it was.

Letters: S rows, T new tokens, H query heads, G key/value heads, P head dimension (= N, the state size of Mamba2), C
conv channels, K conv width, J sub-heads of M channels (Mamba1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.bench.case import Case, Inputs, Operation, Random, Shape
from mambify.ops.backends import HAS_TRITON
from mambify.ops.causal_conv import causal_conv
from mambify.ops.conv_replay import conv_replay
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing, selective_replay
from mambify.ops.selective_scan import selective_scan_step
from mambify.ops.ssd import ssd_step
from mambify.ops.ssd_replay import SSDRing, ssd_replay

if HAS_TRITON:
    from mambify.bench.replay_peers import CopyAndRecompute, StatePerToken

_K, _SUBHEAD, _PENDING = 4, 16, 4

#: B rows, T new tokens; T = 1 is plain decoding
REPLAY_SHAPES = {
    "cpu": (Shape("135M", 4, 5, 9, 3, 64),),
    "cuda": (
        *(Shape("8B", rows, 5, 32, 8, 128) for rows in (1, 8, 64, 256)),
        *(Shape("8B, one token", rows, 1, 32, 8, 128) for rows in (1, 64, 256)),
    ),
}


def _place(s: Shape, inputs: Inputs, *, eager: bool = False, pending: int = _PENDING) -> RingPlace:
    place = RingPlace.empty(s.B, s.T, device=inputs["x"].device, eager=eager)
    place.active_S.fill_(True)
    place.head_S.fill_(pending)
    place.pending_S.fill_(pending)
    return place


def ssd_replay_case(s: Shape, random: Random, *, fold: bool = False, pending: int = _PENDING) -> Case:
    """Mamba2; ``fold`` takes the state over what is pending as well."""
    inputs = {
        "x": random(s.B, s.T, s.G, s.P),
        "dt": F.softplus(random(s.B, s.T, s.H).float() - 2),
        "A": -random(s.H).float().abs() - 1,
        "B": random(s.B, s.T, s.G, s.P) / s.P**0.5,
        "C": random(s.B, s.T, s.H, s.P),
        "D": random(s.H).float(),
        "state": random(s.B, s.H, s.P, s.P).float(),
    }
    # Without Δ what is pending changes nothing; reading it and folding it cost the same.
    place, x = _place(s, inputs, eager=fold, pending=pending), inputs["x"]
    ring = SSDRing.zeros(
        1, s.B, place.capacity, H=s.H, G=s.G, P=s.P, N=s.P, dtype=x.dtype, device=x.device
    ).layer(0)  # fmt: skip

    def ours(i: Inputs, backend: str) -> Tensor:
        return ssd_replay(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["state"], ring, place, backend=backend)

    def steps(i: Inputs) -> Tensor:
        state, outputs = i["state"], []
        for t in range(s.T):
            y, state = ssd_step(i["x"][:, t], i["dt"][:, t], i["A"], i["B"][:, t], i["C"][:, t], i["D"], state)
            outputs.append(y)
        return torch.stack(outputs, 1)

    peers: dict[str, Operation] = {"steps": steps}
    if x.is_cuda and not fold:
        # Made when they are first called: a state a token of 256 rows is 3 GB.
        peers = {
            "state per token": _lazily(lambda i: StatePerToken(i["state"], s.T)),
            "copy and recompute": _lazily(lambda i: CopyAndRecompute(i["state"], min(_PENDING, s.T))),
        }
    name = "ssd_replay_folding" if fold else "ssd_replay"
    return Case(name, f"S={s.B} T={s.T} H={s.H} G={s.G} P={s.P}", inputs, ours, {} if fold else peers, step=True)


def _lazily(make: Callable[[Inputs], Operation]) -> Operation:
    made: list[Operation] = []

    def run(i: Inputs) -> Tensor:
        if not made:
            made.append(make(i))
        return made[0](i)

    return run


def selective_replay_case(s: Shape, random: Random, *, fold: bool = False, pending: int = _PENDING) -> Case:
    """Mamba1; ``fold`` takes the state over what is pending as well."""
    J, M, U = s.H * s.P // _SUBHEAD, _SUBHEAD, s.P // _SUBHEAD
    inputs = {
        "x": random(s.B, s.T, J, M),
        "dt": F.softplus(random(s.B, s.T, J, M).float() - 2),
        "A": -random(J, M, M).float().abs() - 0.5,
        "B": random(s.B, s.T, s.G, U, M),
        "C": random(s.B, s.T, J, M),
        "D": random(J, M).float(),
        "state": random(s.B, J, M, M).float(),
    }
    place, x = _place(s, inputs, eager=fold, pending=pending), inputs["x"]
    ring = SelectiveRing.zeros(
        1, s.B, place.capacity, J=J, M=M, G=s.G, U=U, N=M, dtype=x.dtype, device=x.device
    ).layer(0)  # fmt: skip

    def ours(i: Inputs, backend: str) -> Tensor:
        return selective_replay(
            i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["state"], ring, place, backend=backend
        )

    def steps(i: Inputs) -> Tensor:
        state, outputs = i["state"], []
        for t in range(s.T):
            B = i["B"][:, t, :, None].expand(-1, -1, s.H // s.G, -1, -1).flatten(1, 3)
            y, state = selective_scan_step(i["x"][:, t], i["dt"][:, t], i["A"], B, i["C"][:, t], i["D"], state)
            outputs.append(y)
        return torch.stack(outputs, 1)

    return Case("selective_replay", f"S={s.B} T={s.T} J={J} M={M}", inputs, ours, {"steps": steps}, step=True)


def _conv_replay(s: Shape, random: Random) -> Case:
    C = (2 * s.G + s.H) * s.P
    # As in a mixer: the channels are part of a wider projection.
    inputs = {"x": random(s.B, s.T, C + s.H * s.P)[..., s.H * s.P :], "weight": random(C, _K), "bias": random(C)}
    place = _place(s, inputs)
    ring = random(s.B, place.capacity, C)

    def ours(i: Inputs, backend: str) -> Tensor:
        return conv_replay(i["x"], i["weight"], i["bias"], ring, place, backend=backend)

    def copying(i: Inputs) -> Tensor:
        """With the window in a buffer of its own, as causal_conv takes it."""
        return causal_conv(i["x"], i["weight"], i["bias"], initial_state_BCL=ring[:, _PENDING - _K + 1 : _PENDING].mT)[
            0
        ]

    return Case("conv_replay", f"S={s.B} T={s.T} C={C} K={_K}", inputs, ours, {"causal_conv": copying}, step=True)


REPLAY_MAKERS: dict[str, Callable[[Shape, Random], Case]] = {
    "ssd_replay": ssd_replay_case,
    "ssd_replay_folding": partial(ssd_replay_case, fold=True),
    "selective_replay": selective_replay_case,
    "conv_replay": _conv_replay,
}
