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
    window: int | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scaling · q kᵀ) v over the first ``lengths`` entries of each row's buffers, the queries' own the last T.

    Each query sees the entries up to its own. Only what a row has filled is read, so a step costs the tokens there are
    and not the length of the buffers. Query head h looks at key/value head h // (H // G).

    Args:
        lengths_S: tokens in each row's buffers, at least T.
        window: a query sees only the last ``window`` entries up to its own (sliding attention); ``None`` for all.
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
    given = (q_STHP, keys_SGLP, values_SGLP, lengths_S, scaling, window)
    return reference.decode_attention(*given) if chosen == "reference" else kernels.decode_attention(*given, overlap)
