"""Attention of the last few tokens of each row over keys and values in fixed buffers, of which each row has filled its
own share: one token a step of plain decoding, several where drafted tokens are verified.

Letters: S rows (slots), T queries of a row, H query heads, G key/value heads, P head dimension, L length of buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.decode_attention import reference

if HAS_TRITON:
    from mambify.ops.decode_attention import triton as kernels

__all__ = ["decode_attention"]


def decode_attention(
    q_STHP: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    *,
    scaling: float,
    more: int = 0,
    window: int | None = None,
    counts_X: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scaling · q kᵀ) v over the first ``lengths`` entries of each row's buffers, the queries' own the last T.

    Each query sees the entries up to its own. Only what a row has filled is read, so a step costs the tokens there are
    and not the length of the buffers. Query head h looks at key/value head h // (H // G).

    Args:
        lengths_S: tokens in each row's buffers; with ``more`` at least T.
        more: tokens beside these, of each row: T where the new ones are not counted yet.
        window: a query sees only the last ``window`` entries up to its own (sliding attention); ``None`` for all.
        counts_X: S·G zeros or more, int32, with which a single kernel does all where rows are divided in few parts;
            zeros again afterwards, so that one call after another may have the same.
        overlap: kernels start while those before them end (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton".

    Returns:
        ``[S, T, H, P]`` in q's dtype.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    slots, _, heads, head_dim = q_STHP.shape
    groups, length = keys_SGLP.shape[1:3]
    supported = q_STHP.dtype == keys_SGLP.dtype == values_SGLP.dtype != torch.float64
    chosen = pick_backend("decode_attention", backend, backends_on(q_STHP.device, supported=supported))
    if heads % groups:
        raise ValueError(f"decode_attention: needs G dividing H, got G={groups}, H={heads}")
    check_shape("decode_attention", "keys_SGLP", keys_SGLP, (slots, groups, length, head_dim))
    check_shape("decode_attention", "values_SGLP", values_SGLP, (slots, groups, length, head_dim))
    check_shape("decode_attention", "lengths_S", lengths_S, (slots,))
    if counts_X is not None and (counts_X.dtype != torch.int32 or counts_X.numel() < slots * groups):
        raise ValueError(f"decode_attention: counts_X must be {slots * groups} int32 zeros or more")
    given = q_STHP, keys_SGLP, values_SGLP, lengths_S, scaling, window, more
    return (
        reference.decode_attention(*given)
        if chosen == "reference"
        else kernels.decode_attention(*given, counts_X, overlap)
    )
