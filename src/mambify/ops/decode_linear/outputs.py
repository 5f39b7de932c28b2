"""How kernels take one to three weights that read the same input: always three, of which some may be nothing.

Letters: M rows, O outputs of all weights together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What a launch has of them.

    Attributes:
        y_MO: what is written, or added to.
        weights, biases: three each.
        heights: of the weights; of a gated pair one.
    """

    y_MO: Tensor
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    heights: tuple[int, ...]

    @classmethod
    def of(
        cls,
        rows: int,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        add_to_MO: Tensor | None,
        *,
        gated: bool,
    ) -> Outputs:
        """Of ``rows`` rows; see :func:`mambify.ops.decode_linear.decode_linear`."""
        heights = [len(weights[0])] if gated else [*map(len, weights)]
        y_MO = weights[0].new_empty(rows, sum(heights)) if add_to_MO is None else add_to_MO
        none = [None] * (3 - len(weights))
        return cls(y_MO, (*weights, *none), (*biases, *none), tuple(heights))

    @property
    def sizes(self) -> dict[str, int]:
        """The three heights by the names that kernels have for them."""
        return dict(zip(("O0", "O1", "O2"), (*self.heights, 0, 0), strict=False))

    def grid(self, block: int) -> tuple[int]:
        """A program for each ``block`` outputs of one weight, or of a gated pair."""
        return (sum(-(-height // block) for height in self.heights),)
