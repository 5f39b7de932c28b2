"""Where each row stands in the rings of recent tokens: shared by ops.ssd_replay, ops.selective_replay,
ops.conv_replay, ops.mamba1_step and ops.mamba2_step.

A row that reads T new tokens does not know yet how many of them will be accepted. So the recurrent state stays where
it is, and the new tokens' inputs are written into a ring behind those that were accepted before:

    … | folded | pending (accepted, not in the state) | T new ones | free …
                                                      ↑ head

Accepting n of the T moves the head on by n, and the rejected ones are written over in the next round. A kernel reads
pending places and writes new ones; the two never meet as long as pending + T ≤ R, so that no program can read what
another one of the same launch writes, and nothing has to be buffered twice.

Letters: S rows (slots), R places of a ring, T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LEAST = 16  # the least a matrix product of the kernels takes


def ring_capacity(most_new: int) -> int:
    """A good number of places for rounds of up to ``most_new`` tokens: what is pending is folded every few rounds."""
    capacity = 2 * _LEAST
    while capacity < 2 * most_new:
        capacity *= 2
    return capacity


@dataclass(frozen=True)
class RingPlace:
    """Where rows stand in rings of ``capacity`` places; one for all layers of a model. Counts stay on the device.

    Attributes:
        head_S: integers, the place of each row's next token, 0 ≤ head < R.
        pending_S: integers, accepted tokens before the head that are not in the row's state yet.
        active_S: whether the row takes part. Nothing of a row that does not is written, and its outputs are zero.
        capacity: R, a power of two, at least 16 and twice ``most_new``.
        most_new: the most new tokens of a round. The places for them are kept free.
        eager: fold whatever is pending in each round, instead of only when places run short.

    Raises:
        ValueError: a capacity that does not suit.
    """

    head_S: Tensor
    pending_S: Tensor
    active_S: Tensor
    capacity: int
    most_new: int
    eager: bool = False

    def __post_init__(self) -> None:
        R, least = self.capacity, max(_LEAST, 2 * self.most_new)
        if self.most_new < 1 or least > R or R & (R - 1):
            raise ValueError(
                f"rings for {self.most_new} new tokens need a power of two of at least {least} places and one new "
                f"token, got {R} places"
            )

    @classmethod
    def empty(
        cls, slots: int, most_new: int, *, device: torch.device | str, capacity: int | None = None, eager: bool = False
    ) -> RingPlace:
        """Rows of which none is active and nothing is pending."""
        head_S, pending_S = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        active_S = torch.zeros(slots, dtype=torch.bool, device=device)
        return cls(head_S, pending_S, active_S, capacity or ring_capacity(most_new), most_new, eager)

    def first(self, slots: int) -> RingPlace:
        """The first rows, as views."""
        head_S, pending_S, active_S = self.head_S[:slots], self.pending_S[:slots], self.active_S[:slots]
        return replace(self, head_S=head_S, pending_S=pending_S, active_S=active_S)

    def check(self, operation: str, slots: int, new: int) -> None:
        """Raises ValueError unless there are ``slots`` rows and place for ``new`` tokens."""
        if not 1 <= new <= self.most_new:
            raise ValueError(f"{operation}: these rings are for 1 to {self.most_new} new tokens, got {new}")
        for name in ("head_S", "pending_S", "active_S"):
            shape = tuple(getattr(self, name).shape)
            if shape != (slots,):
                raise ValueError(f"{operation}: place.{name} must have shape {(slots,)}, got {shape}")

    def folds_above(self, new: int) -> int:
        """A call with ``new`` tokens also folds the pending ones of rows that have more of them than this.

        After it, ``new`` more may be pending, and there must still be place for ``most_new``.
        """
        return 0 if self.eager else self.capacity - new - self.most_new

    def settle(self) -> None:
        """Nothing is pending any more in active rows: to be called once after a fold of all layers (``ssd_fold``)."""
        self.pending_S.masked_fill_(self.active_S, 0)

    def pending_places(self) -> tuple[Tensor, Tensor]:
        """Ring places of what is pending, oldest first, ``[S, R]``, and which of them are any, ``[S, R]``."""
        entry_R = torch.arange(self.capacity, device=self.head_S.device)
        first_S1 = (self.head_S - self.pending_S)[:, None]
        return (first_S1 + entry_R).remainder(self.capacity), entry_R < self.pending_S[:, None]

    def new_places(self, new: int) -> Tensor:
        """Ring places of ``new`` new tokens, ``[S, T]``."""
        return (self.head_S[:, None] + torch.arange(new, device=self.head_S.device)).remainder(self.capacity)


def write_ring(ring_SRx: Tensor, new_STx: Tensor, place: RingPlace) -> None:
    """Puts the new tokens' values into the places behind the head of active rows; x: any further dimensions."""
    at_ST = place.new_places(new_STx.shape[1])
    row_S1 = torch.arange(len(at_ST), device=at_ST.device)[:, None]
    active = place.active_S.view(-1, *[1] * (new_STx.dim() - 1))
    ring_SRx[row_S1, at_ST] = torch.where(active, new_STx.to(ring_SRx.dtype), ring_SRx[row_S1, at_ST])


def read_ring(ring_SRx: Tensor, at_SE: Tensor, known_SE: Tensor) -> Tensor:
    """The values at places ``at_SE``, zero where not ``known``: unused places may hold anything, NaN too."""
    found_SEx = ring_SRx[torch.arange(len(at_SE), device=at_SE.device)[:, None], at_SE]
    return found_SEx.masked_fill(~known_SE.view(*known_SE.shape, *[1] * (ring_SRx.dim() - 2)), 0)


def is_all_false(mask: Tensor) -> bool:
    """Whether nothing is to be done; on a GPU looking would wait for the device, so there the answer is no."""
    return mask.device.type == "cpu" and not bool(mask.any())


def check_contiguous(operation: str, *buffers: Tensor) -> None:
    """Raises ValueError where a kernel could not write into ``buffers`` in place."""
    if not all(buffer.is_contiguous() for buffer in buffers):
        raise ValueError(f"{operation}: states and rings are written in place and must be contiguous")
