"""What attention does between its projection and its scores, in one launch: norms of heads, rotation, and new keys and
values put behind those that a slot holds.

Letters: S rows (slots), T new tokens, H query heads, G key/value heads, P head dimension, J = P/2 pairs of channels, L
length of buffers, E = (H + 2G)·P outputs of the projections of q, k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.rotate_kv import reference

if HAS_TRITON:
    from mambify.ops.rotate_kv import triton as kernels

__all__ = ["rotate_kv"]


@torch.no_grad()
def rotate_kv(
    qkv_STE: Tensor,
    cos_LJ: Tensor,
    sin_LJ: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    *,
    q_norm_P: Tensor | None = None,
    k_norm_P: Tensor | None = None,
    eps: float = 0.0,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Returns rotated queries; writes rotated keys, and values, into places ``lengths``, ``lengths + 1``, … of a row.

    It is an RMSNorm of each head of q and k, where its weight is given, and :func:`mambify.ops.rope.rotate` at these
    positions. Not for training.

    Args:
        qkv_STE: ``[q | k | v]``, heads by heads.
        cos_LJ, sin_LJ: of the angles of every position, of the first half of the channels; the second has the same.
        keys_SGLP, values_SGLP: changed in place.
        lengths_S: tokens that each row holds already; integers, at most L − T.
        q_norm_P, k_norm_P, eps: of the norms, both or none.
        overlap: the kernel starts while the one before it ends (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton" (one dtype for q, k, v and buffers, no float64).

    Returns:
        ``[S, T, H, P]``, contiguous.

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    S, _, outputs = qkv_STE.shape
    _, G, L, P = keys_SGLP.shape
    H, rest = divmod(outputs - 2 * G * P, P)
    supported = qkv_STE.dtype == keys_SGLP.dtype == values_SGLP.dtype != torch.float64
    chosen = pick_backend("rotate_kv", backend, backends_on(qkv_STE.device, supported=supported))
    if rest or H < 1 or P % 2:
        raise ValueError(f"rotate_kv: {outputs} outputs are not those of heads of {P} and G={G}")
    check_shape("rotate_kv", "keys_SGLP", keys_SGLP, (S, G, L, P))
    check_shape("rotate_kv", "values_SGLP", values_SGLP, (S, G, L, P))
    check_shape("rotate_kv", "lengths_S", lengths_S, (S,))
    for name, norm_P in (("q_norm_P", q_norm_P), ("k_norm_P", k_norm_P)):
        check_shape("rotate_kv", name, norm_P, (P,))
    for name, table_LJ in (("cos_LJ", cos_LJ), ("sin_LJ", sin_LJ)):
        if table_LJ.shape[1:] != (P // 2,) or len(table_LJ) < L:
            raise ValueError(f"rotate_kv: {name} must have shape {(L, P // 2)} at least, got {tuple(table_LJ.shape)}")
    if (q_norm_P is None) != (k_norm_P is None):
        raise ValueError("rotate_kv: give both norms or none")
    given = (qkv_STE, cos_LJ, sin_LJ, keys_SGLP, values_SGLP, lengths_S, q_norm_P, k_norm_P, eps)
    return reference.rotate_kv(*given) if chosen == "reference" else kernels.rotate_kv(*given, overlap)
