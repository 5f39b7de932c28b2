"""A linear projection whose width suits the hardware, whatever its number of outputs.

Legend: O outputs, D inputs.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

_MULTIPLE = 8  # 16 bytes of bfloat16: what tensor cores' fast loads need of every row


class PaddedLinear(nn.Linear):
    """nn.Linear that, on a GPU, computes with rows of zeros below a weight whose height is no multiple of 8.

    One row too many or too few makes the three matrix products of a training step fall back to kernels of two
    generations ago, at a third of the speed. The output is a view without the extra columns; parameters and results
    are nn.Linear's.
    """

    def forward(self, x: Tensor) -> Tensor:
        missing = -self.out_features % _MULTIPLE
        if not missing or x.device.type != "cuda":
            return super().forward(x)
        bias_O: Tensor | None = self.bias
        if bias_O is not None:
            bias_O = F.pad(bias_O, (0, missing))
        return F.linear(x, F.pad(self.weight, (0, 0, 0, missing)), bias_O)[..., : self.out_features]
