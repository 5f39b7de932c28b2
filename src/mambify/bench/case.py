"""What ``mambify bench ops`` measures in a row: an operation on inputs of a real layer, and others' code for the same.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension, D hidden size, F intermediate size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Inputs = Mapping[str, Tensor]
Operation = Callable[[Inputs], Tensor]
Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and one batch."""

    name: str
    B: int
    T: int
    H: int
    G: int
    P: int
    D: int = 64
    F: int = 128
    V: int = 1000


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Attributes:
        ours: takes the backend; gives one output.
        peers: name → a function that gives the same output, or one that raises PeerMissingError.
        trained: inputs that get gradients; ``None`` for all.
        step: one token of decoding, which has no backward pass.
        exact: ours must give what the reference gives, to the bit.
        layouts: of a peer that wants its inputs laid out in another way: name → how; not part of its time.
        unrecorded: peers that wait for the device, so that no CUDA graph can be made of them; timed as they are called.
    """

    operation: str
    shape: str
    inputs: Inputs
    ours: Callable[[Inputs, str], Tensor]
    peers: Mapping[str, Operation]
    trained: tuple[str, ...] | None = None
    step: bool = False
    exact: bool = False
    unrecorded: tuple[str, ...] = ()
    layouts: Mapping[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)

    def inputs_of(self, name: str) -> Inputs:
        """The inputs as the peer of this name takes them."""
        return self.layouts[name](self.inputs) if name in self.layouts else self.inputs
