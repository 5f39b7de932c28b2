"""Linear layers of a few tokens, with what stands around them in a block: a norm before, a gate, a sum or a short
convolution behind.

A decoding step reads every weight once and multiplies it with few rows, so its time is that of the reading. What comes
before and after costs a launch each, if it is a kernel of its own, and next to nothing within one that reads weights.

Letters: M rows (tokens), D inputs, O outputs of all weights together; where they are convolved M = S·T, of S slots and
T tokens, C channels, K width, R places of the ring.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.conv_replay import conv_replay
from mambify.ops.decode_linear import onednn, reference
from mambify.ops.decode_linear.convolution import Convolution
from mambify.ops.decode_linear.onednn import Packed, pack
from mambify.ops.decode_linear.onednn import supports as can_pack

if HAS_TRITON:
    from mambify.ops.decode_linear import triton as kernels

__all__ = ["Convolution", "Packed", "can_pack", "convolves", "decode_linear", "decode_packed", "pack"]

_MOST_CONVOLVED = 8  # rows


@torch.no_grad()
def decode_linear(
    x_MD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to_MO: Tensor | None = None,
    convolution: Convolution | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``x Wᵀ + b`` for one to three weights that read the same input; not for training.

        x ← norm · x / sqrt(mean_D(x²) + eps)              where a norm is given
        y = [x W₁ᵀ + b₁ | x W₂ᵀ + b₂ | …]                  or SiLU(x W₁ᵀ + b₁) · (x W₂ᵀ + b₂) where ``gated``
        add_to ← add_to + y                                where it is given

    The weights stay where they are: several of them need not be one tensor to be read by one kernel.

    Args:
        x_MD: inputs, rounded to the weights' dtype where theirs is wider. Sums are kept in float32.
        weights: each ``[O_i, D]``.
        biases: each ``[O_i]`` or None; None for none at all.
        norm_D, eps: of an RMSNorm before.
        gated: of two weights of the same height.
        add_to_MO: changed in place, and the result, in its own dtype; not part of the memory of ``x``.
        convolution: of some outputs of one weight, which then go on convolved.
        overlap: the kernel starts while the one before it ends, and reads its first weights meanwhile (programmatic
            dependent launch, compute capability 9.0 on); everything else it reads after that one has ended.
        backend: "auto", "reference" (PyTorch's own products) or "triton" (up to 8 rows, 16 of half precision,
            contiguous weights of one dtype, no float64). In float32 the order of sums depends on D alone: a row's
            result is the same to the last bit however many rows there are. In half precision that is so where there
            are fewer than some two thousand outputs, of up to 1,536 inputs; else among up to eight rows where there are
            few outputs and among one and two where there are many, and among those from there on.

    Returns:
        y_MO in the weights' dtype, whose rows may lie further apart than O; ``add_to_MO`` where it is given.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    supported = HAS_TRITON and kernels.supports(x_MD, weights, add_to_MO, convolution)
    chosen = pick_backend("decode_linear", backend, backends_on(x_MD.device, supported=supported))
    M, D = x_MD.shape
    if not 1 <= len(weights) <= 3 or len(biases) != len(weights) or (gated and len(weights) != 2):
        raise ValueError("decode_linear: takes one to three weights, two where gated, and as many biases")
    for weight, bias in zip(weights, biases, strict=True):
        check_shape("decode_linear", "a weight", weight, (len(weights[0]) if gated else len(weight), D))
        check_shape("decode_linear", "a bias", bias, (len(weight),))
    outputs = len(weights[0]) if gated else sum(map(len, weights))
    check_shape("decode_linear", "norm_D", norm_D, (D,))
    check_shape("decode_linear", "add_to_MO", add_to_MO, (M, outputs))
    if convolution is not None:
        _check_convolution(convolution, M, outputs, alone=len(weights) == 1 and add_to_MO is None)
    given = (x_MD, weights, biases, norm_D, eps, gated, add_to_MO)
    if chosen == "reference":
        y_MO = reference.decode_linear(*given)
    elif convolution is None or not convolves(M, weights[0]):
        y_MO = kernels.decode_linear(*given, None, overlap)
    else:
        return kernels.decode_linear(*given, convolution, overlap)
    if convolution is None:
        return y_MO
    return _convolved(y_MO, convolution, "reference" if backend == "reference" else "auto")


def convolves(rows: int, weight: Tensor) -> bool:
    """Whether the kernel for so many rows makes a convolution of its outputs itself.

    Where it does not, :func:`decode_linear` has it made by another kernel and puts it back among the outputs; whoever
    can read it elsewhere spares that.
    """
    return rows <= _MOST_CONVOLVED and not (HAS_TRITON and kernels.way_of(rows, [weight]) == "tiles")


def _check_convolution(convolution: Convolution, rows: int, outputs: int, *, alone: bool) -> None:
    first, weight_CK, bias_C, ring_SRC, place = convolution
    slots, (channels, width) = len(place.head_S), weight_CK.shape
    if not alone or rows % slots or not 0 <= first <= outputs - channels:
        raise ValueError(
            f"decode_linear: convolves channels of one weight, without a sum, of {slots} slots; got {rows} rows and "
            f"channels {first} to {first + channels} of {outputs} outputs"
        )
    place.check("decode_linear", slots, rows // slots)
    if rows // slots + width - 1 > place.capacity:
        raise ValueError(f"decode_linear: {rows // slots} new tokens and a width of {width} do not fit the ring")
    check_shape("decode_linear", "bias_C", bias_C, (channels,))
    check_shape("decode_linear", "ring_SRC", ring_SRC, (slots, place.capacity, channels))


def _convolved(y_MO: Tensor, convolution: Convolution, backend: str) -> Tensor:
    first, weight_CK, bias_C, ring_SRC, place = convolution
    part_MC = y_MO[:, first : first + len(weight_CK)]
    new_STC = part_MC.unflatten(0, (len(ring_SRC), -1))
    part_MC.copy_(conv_replay(new_STC, weight_CK, bias_C, ring_SRC, place, backend=backend).flatten(0, 1))
    return y_MO


def decode_packed(
    x_MD: Tensor,
    packed: Packed,
    *,
    norm_D: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to_MO: Tensor | None = None,
) -> Tensor:
    """:func:`decode_linear` on a CPU, of weights that :func:`pack` laid out: as fast as memory gives them, for one row
    and for eight. The order of sums may depend on the number of rows.

    Neither shapes nor whether gradients are wanted is looked at: for a small model either would be felt.
    """
    return onednn.decode_linear(x_MD, packed, norm_D, eps, gated, add_to_MO)
