"""The convolution of outputs by the program that made them, as kernels of linear layers call it.

Letters: C channels, K width, R places of the ring, S slots, T tokens of a slot, M = S·T rows; ROWS, M padded.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.decode_linear.convolution import Convolution
from mambify.ops.ring import check_contiguous


def arguments_of(convolution: Convolution | None, rows: int) -> tuple[tuple[Tensor | None, ...], dict[str, int]]:
    """What a kernel takes of it: tensors, and sizes, of which C = 0 says that there is none."""
    if convolution is None:
        return (None,) * 5, {"FIRST": 0, "C": 0, "K": 1, "R": 1, "T": 1}
    first, weight_CK, bias_C, ring_SRC, place = convolution
    check_contiguous("decode_linear", ring_SRC)
    channels, width = weight_CK.shape
    bias_C = None if bias_C is None else bias_C.contiguous()
    sizes = {"FIRST": first, "C": channels, "K": width, "R": place.capacity, "T": rows // len(ring_SRC)}
    return (weight_CK.contiguous(), bias_C, ring_SRC, place.head_S, place.active_S), sizes


@triton.jit
def asked_for(
    taps_ptr, ring_ptr, head_ptr, o,
    FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The K − 1 inputs before the head of every slot, slot by slot, and the taps, of the program's channels."""
    c, is_channel = o - FIRST, (o >= FIRST) & (o < FIRST + C)
    past, taps = (), ()
    for k in tl.static_range(K):
        taps += (tl.load(taps_ptr + c * K + k, mask=is_channel, other=0.0),)
    for s in tl.static_range(S):
        head = tl.load(head_ptr + s).to(tl.int32)
        for k in tl.static_range(K - 1):
            place = ring_ptr + (s * R + ((head + k - (K - 1)) & (R - 1))) * C + c
            past += (tl.load(place, mask=is_channel, other=0.0),)
    return past, taps


@triton.jit
def convolved(
    y, taps, past, bias_ptr, ring_ptr, head_ptr, active_ptr, o, m,
    FIRST: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Outputs ``[BLOCK_O, ROWS]`` of which those that are channels are convolved, with sums in the order of
    ops.conv_replay; their inputs go into the ring, at places that no program reads now."""
    c, is_channel = o - FIRST, (o >= FIRST) & (o < FIRST + C)
    bias = tl.zeros((BLOCK_O,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    whole = y
    for s in tl.static_range(M // T):
        head, active = tl.load(head_ptr + s).to(tl.int32), tl.load(active_ptr + s) != 0
        window = ()
        for k in tl.static_range(K - 1):
            window += (past[s * (K - 1) + k].to(tl.float32),)
        for t in tl.static_range(T):
            new = tl.sum(tl.where((m == s * T + t)[None, :], y, 0.0), 1).to(ring_ptr.dtype.element_ty)
            place = ring_ptr + (s * R + ((head + t) & (R - 1))) * C + c
            tl.store(place, new, mask=is_channel & (c < tl.where(active, C, 0)))
            window += (new.to(tl.float32),)
        for t in tl.static_range(T):
            total = bias
            for k in tl.static_range(K):
                total += window[t + k] * taps[k].to(tl.float32)
            total = tl.where(active, total * tl.sigmoid(total), 0.0)
            whole = tl.where((m == s * T + t)[None, :] & is_channel[:, None], total[:, None], whole)
    return whole
