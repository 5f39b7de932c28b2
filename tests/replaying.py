"""Rounds of replay beside plain stepping, for tests of ops.ssd_replay, ops.selective_replay and ops.conv_replay.

A :class:`Replayed` layer goes through rounds of ``verify`` and ``accept``; the same inputs are stepped through one
token at a time in float64, and whatever the two should share is compared. Places of the ring that nothing may read hold
NaN.

Letters: S rows, T new tokens, R places, H heads, G of x, U of B, V of C, P head dimension, N state size, J = G·Q·U
sub-heads, M channels a sub-head, C conv channels, K width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.ops.causal_conv import causal_conv_step
from mambify.ops.conv_replay import conv_replay, load_window, read_window
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import move_on
from mambify.ops.selective_replay import SelectiveRing, selective_fold, selective_replay
from mambify.ops.selective_scan import selective_scan_step
from mambify.ops.ssd import ssd_step
from mambify.ops.ssd_replay import SSDRing, ssd_fold, ssd_replay

#: largest difference of outputs, over the largest output
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
#: the same of states, which are float32 whatever the inputs are
STATE_TOLERANCE = 1e-5


def advance(place: RingPlace, accepted_S: Tensor, new: int) -> None:
    """Ends a round of ``new`` tokens: ``accepted_S`` of each active row's are kept."""
    move_on(place, torch.zeros_like(place.head_S), accepted_S, folds_above=place.folds_above(new))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value (or 1); infinite where something is not finite."""
    if not actual.numel():
        return 0.0
    error = (actual.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return float(error) if error.isfinite() else float("inf")


class Replayed:
    """One layer of ``slots`` rows; subclasses know the operation.

    Attributes:
        buffers: what the operation may change in place: states and rings.
        plain: the float64 state after the accepted tokens, rows first, on the CPU.
    """

    buffers: list[Tensor]
    plain: Tensor

    def __init__(
        self,
        *,
        slots: int = 3,
        most_new: int = 5,
        capacity: int = 16,
        eager: bool = False,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.slots, self.dtype, self.backend, self.device = slots, dtype, backend, device
        self.place = RingPlace.empty(slots, most_new, device=device, capacity=capacity, eager=eager)
        self.place.active_S.fill_(True)
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def draw(self, new: int) -> Sequence[Tensor]:
        """Inputs of a round, tokens on axis 1."""
        raise NotImplementedError

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def step(self, token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """One token of float64 inputs: its output and the state after it."""
        raise NotImplementedError

    def poison(self) -> None:
        """NaN into the places that nothing may read."""
        raise NotImplementedError

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes).to(self.device, self.dtype)

    def verify(self, new: int) -> None:
        """A round of ``new`` tokens, not accepted yet."""
        self.poison()
        inputs = self.draw(new)
        before = [buffer.clone() for buffer in self.buffers]
        actual = self.replay(inputs).cpu()
        exact = [value.cpu().double() for value in inputs]
        self.states, outputs = [self.plain], []
        for t in range(new):
            y, state = self.step([value[:, t] for value in exact], self.states[-1])
            outputs.append(y)
            self.states.append(state)
        active = self.place.active_S.cpu()
        error = difference(actual[active], torch.stack(outputs, 1)[active])
        assert error < TOLERANCE[self.dtype], f"outputs off by {error:.1e}"
        assert not actual[~active].any()
        for buffer, old in zip(self.buffers, before, strict=True):
            idle = ~self.place.active_S
            assert torch.equal(buffer[idle].nan_to_num(7.0), old[idle].nan_to_num(7.0)), (
                "a row that is not active changed"
            )

    def accept(self, accepted: Sequence[int], new: int) -> None:
        """Ends the round: so many of each active row's tokens are kept."""
        for row, count in enumerate(accepted):
            if self.place.active_S[row]:
                self.plain = self.plain.clone()
                self.plain[row] = self.states[count][row]
        advance(self.place, torch.tensor(accepted, device=self.device), new)
        assert int(self.place.pending_S.max()) + self.place.most_new <= self.place.capacity

    def set_active(self, active: Sequence[bool]) -> None:
        self.place.active_S.copy_(torch.tensor(active))

    def finish(self) -> None:
        """All rows at once: what is left of the rings and states is the plain state."""
        raise NotImplementedError


class Mamba2(Replayed):
    """ops.ssd_replay, with Δ made from dt and its bias."""

    H, G, P, N = 4, 2, 16, 16
    heads_of_B, heads_of_C = 0, 0  # those of x, and all

    def build(self) -> None:
        self.ring = SSDRing.zeros(
            1, self.slots, self.place.capacity, H=self.H, G=self.G, U=self.heads_of_B or self.G, P=self.P, N=self.N,
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.state = torch.randn(1, self.slots, self.H, self.P, self.N).to(self.device)
        self.plain = self.state[0].cpu().double()
        self.A, self.D, self.bias = -torch.linspace(0.05, 4.0, self.H), torch.randn(self.H), torch.randn(self.H) - 2
        self.buffers = [self.state[0], *self.ring.layer(0)]

    def draw(self, new: int) -> Sequence[Tensor]:
        # As in a mixer: views of one projection.
        U, V = self.heads_of_B or self.G, self.heads_of_C or self.H
        sizes = [self.G * self.P, U * self.N, V * self.N]
        x, B, C = self.random(self.slots, new, sum(sizes)).split(sizes, dim=-1)
        return (
            x.unflatten(-1, (self.G, self.P)),
            self.random(self.slots, new, self.H),
            B.unflatten(-1, (U, self.N)) * self.N**-0.5,
            C.unflatten(-1, (V, self.N)),
        )

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        x, dt, B, C = inputs
        A, D, bias = (value.to(self.device) for value in (self.A, self.D, self.bias))
        return ssd_replay(
            x, dt, A, B, C, D, self.state[0], self.ring.layer(0), self.place, dt_bias_H=bias, backend=self.backend
        )

    def step(self, token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, B, C = token
        return ssd_step(x, F.softplus(dt + self.bias), self.A, B, C, self.D, state)

    def poison(self) -> None:
        at, known = self.place.pending_places()
        for part in self.ring.layer(0):
            for row in range(self.slots):
                part[row, at[row, ~known[row]]] = float("nan")

    def fold(self) -> None:
        self.poison()
        ssd_fold(self.state, self.A.to(self.device)[None], self.ring, self.place, backend=self.backend)
        self.place.settle()

    def finish(self) -> None:
        self.place.active_S.fill_(True)
        self.fold()
        error = difference(self.state[0], self.plain)
        assert error < STATE_TOLERANCE, f"states off by {error:.1e}"


class StockMamba2(Mamba2):
    """x of every head, B and C of groups of heads."""

    G, heads_of_B, heads_of_C = 4, 2, 2


class Mamba1(Mamba2):
    """ops.selective_replay."""

    G, Q, U, M, N = 2, 2, 2, 8, 16

    def build(self) -> None:
        self.J = self.G * self.Q * self.U
        self.ring = SelectiveRing.zeros(  # type: ignore[assignment]
            1, self.slots, self.place.capacity, J=self.J, M=self.M, G=self.G, U=self.U, N=self.N, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip
        self.state = torch.randn(1, self.slots, self.J, self.M, self.N).to(self.device)
        self.plain = self.state[0].cpu().double()
        self.A = -torch.rand(self.J, self.M, self.N) * 4
        self.D, self.bias = torch.randn(self.J, self.M), torch.randn(self.J, self.M) - 2
        self.buffers = [self.state[0], *self.ring.layer(0)]

    def draw(self, new: int) -> Sequence[Tensor]:
        return (
            self.random(self.slots, new, self.J, self.M),
            self.random(self.slots, new, self.J, self.M),
            self.random(self.slots, new, self.G, self.U, self.N) * self.N**-0.5,
            self.random(self.slots, new, self.J, self.N),
        )

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        x, dt, B, C = inputs
        A, D, bias = (value.to(self.device) for value in (self.A, self.D, self.bias))
        return selective_replay(
            x, dt, A, B, C, D, self.state[0], self.ring.layer(0), self.place, dt_bias_JM=bias, backend=self.backend
        )

    def step(self, token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, B, C = token
        B_SJN = B[:, :, None].expand(-1, -1, self.Q, -1, -1).flatten(1, 3)
        return selective_scan_step(x, F.softplus(dt + self.bias), self.A, B_SJN, C, self.D, state)

    def fold(self) -> None:
        self.poison()
        selective_fold(self.state, self.A.to(self.device)[None], self.ring, self.place, backend=self.backend)
        self.place.settle()


class StockMamba1(Mamba1):
    """All channels share one B and C, and the output is gated."""

    G, Q, U, M, N = 1, 1, 1, 72, 16

    def draw(self, new: int) -> Sequence[Tensor]:
        return *super().draw(new), self.random(self.slots, new, self.J, self.M)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        x, dt, B, C, z = inputs
        A, D, bias = (value.to(self.device) for value in (self.A, self.D, self.bias))
        return selective_replay(
            x, dt, A, B, C, D, self.state[0], self.ring.layer(0), self.place, dt_bias_JM=bias, z_STJM=z,
            backend=self.backend,
        )  # fmt: skip

    def step(self, token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = super().step(token[:4], state)
        return y * F.silu(token[4]), after


class Conv(Replayed):
    """ops.conv_replay."""

    C, K = 40, 4

    def build(self) -> None:
        self.weight, self.bias = self.random(self.C, self.K), self.random(self.C)
        self.ring = torch.full((self.slots, self.place.capacity, self.C), float("nan")).to(self.device, self.dtype)
        begun = self.random(self.slots, self.C, self.K - 1)
        load_window(self.ring, self.place, torch.arange(self.slots, device=self.device), begun)
        self.plain = begun.cpu().double()
        self.buffers = [self.ring]

    def draw(self, new: int) -> Sequence[Tensor]:
        return (self.random(self.slots, new, self.C + 9)[..., 9:],)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        return conv_replay(*inputs, self.weight, self.bias, self.ring, self.place, backend=self.backend)

    def step(self, token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv_step(*token, self.weight.cpu().double(), self.bias.cpu().double(), state)

    def poison(self) -> None:
        kept = read_window(self.ring, self.place, self.K).clone()
        self.ring.fill_(float("nan"))
        load_window(self.ring, self.place, torch.arange(self.slots, device=self.device), kept)

    def fold(self) -> None:
        """Nothing to do: a window has no state but the ring."""

    def finish(self) -> None:
        assert torch.equal(read_window(self.ring, self.place, self.K).cpu().double(), self.plain)
