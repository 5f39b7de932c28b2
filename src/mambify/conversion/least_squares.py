"""Ridge regression from sums over batches, solved in float64.

Legend: M tokens, I features, D outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: weight of the penalty, relative to the mean of the features' second moments
RIDGE = 1e-2


class NormalEquations:
    """``FᵀF W = FᵀY`` of features F ``[M, I]`` and targets Y ``[M, D]``, added up batch by batch in float32."""

    def __init__(self) -> None:
        self.ff_II: Tensor | None = None
        self.fy_ID: Tensor | None = None
        self.yy: Tensor | None = None

    def add(self, f_MI: Tensor, y_MD: Tensor) -> None:
        """Takes further tokens in."""
        f_MI, y_MD = f_MI.float(), y_MD.float()
        ff_II, fy_ID, yy = f_MI.T @ f_MI, f_MI.T @ y_MD, y_MD.square().sum()
        if self.ff_II is None or self.fy_ID is None or self.yy is None:
            self.ff_II, self.fy_ID, self.yy = ff_II, fy_ID, yy
        else:
            self.ff_II += ff_II
            self.fy_ID += fy_ID
            self.yy += yy

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """W ``[I, D]`` in float64, and the squared error ``‖F W − Y‖²`` that is left.

        Args:
            ridge: weight of ``‖W‖²``, relative to the mean of the features' second moments.
        """
        assert self.ff_II is not None and self.fy_ID is not None and self.yy is not None, "no token was added"
        ff_II, fy_ID = self.ff_II.double(), self.fy_ID.double()
        penalty = ridge * ff_II.diagonal().mean()
        eye_II = torch.eye(len(ff_II), device=ff_II.device, dtype=ff_II.dtype)
        weight_ID = torch.linalg.solve(ff_II + penalty * eye_II, fy_ID)
        left = self.yy.double() - 2 * (weight_ID * fy_ID).sum() + (weight_ID * (ff_II @ weight_ID)).sum()
        return weight_ID, left
