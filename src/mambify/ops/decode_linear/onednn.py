"""Linear layers of a few rows on a CPU: oneDNN's products of weights that were laid out for them beforehand.

PyTorch's float32 products are MKL's. On processors that are not Intel's its product with one row keeps one core busy,
and with two to eight rows is several times slower still, so that five tokens cost more than five times one. oneDNN's
take all cores and read the weights once for all rows, if the weights lie in blocks as wide as its registers. They are
therefore copied: what is packed is as large as the weights themselves.

Letters: M rows, D inputs, O outputs of all weights together.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mambify.norm import rms_norm_of_few
from mambify.ops.swiglu import reference as swiglu

_ROWS = 8  # that the layout is for: laid out for one, it would be read well by one row only
_DTYPES = (torch.float32, torch.bfloat16)
_PROCESSORS = ("x86_64", "AMD64")


class Packed:
    """Weights of one input one below the other, in oneDNN's layout, with their biases.

    Attributes:
        weights: as they were given; kept, so that nothing else can take their place in memory.
        packed_OD: opaque; only :func:`decode_linear` reads it.
        bias_O: or None.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.weights = tuple(weights)
        whole_OD = weights[0] if len(weights) == 1 else torch.cat([*weights])
        # Prompts are read in inference mode and steps may be made outside of it: an inference tensor serves both.
        with torch.inference_mode():
            self.packed_OD: Tensor = torch.ops.mkldnn._reorder_linear_weight(whole_OD.detach(), _ROWS)
        self.bias_O = None
        if any(bias is not None for bias in biases):
            parts = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self.bias_O = torch.cat(parts).detach()


#: one copy serves all who pack the same weights, such as a target and the draft that was cut from it
_shared: WeakValueDictionary[tuple[object, ...], Packed] = WeakValueDictionary()


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are packed there."""
    return (
        device.type == "cpu"
        and dtype in _DTYPES
        and platform.machine() in _PROCESSORS
        and torch.backends.mkldnn.is_available()
    )


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Packed:
    """The weights as they are now, laid out for :func:`decode_linear`. Made once as long as anyone holds it."""
    given = [*weights, *(bias for bias in biases if bias is not None)]
    key = tuple((part.data_ptr(), part.shape, 0 if part.is_inference() else part._version) for part in given)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = Packed(weights, biases)
    return found


def decode_linear(
    x_MD: Tensor, packed: Packed, norm_D: Tensor | None, eps: float, gated: bool, add_to_MO: Tensor | None
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`."""
    x_MD = x_MD.to(packed.packed_OD.dtype)
    if norm_D is not None:
        x_MD = rms_norm_of_few(x_MD, norm_D, eps)
    y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MD, packed.packed_OD, packed.bias_O, "none", [], "")
    if gated:
        y_MO = swiglu.swiglu(*y_MO.chunk(2, dim=1))
    return y_MO if add_to_MO is None else add_to_MO.add_(y_MO)
