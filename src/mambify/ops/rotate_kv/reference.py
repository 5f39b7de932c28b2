"""Norms of heads, rotation and the writing of keys and values in pure torch. Letters as in the package itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.ops.rope import reference as rope


def rotate_kv(
    qkv_STE: Tensor,
    cos_LJ: Tensor,
    sin_LJ: Tensor,
    keys_SGLP: Tensor,
    values_SGLP: Tensor,
    lengths_S: Tensor,
    q_norm_P: Tensor | None,
    k_norm_P: Tensor | None,
    eps: float,
) -> Tensor:
    """See :func:`mambify.ops.rotate_kv.rotate_kv`."""
    S, T, outputs = qkv_STE.shape
    G, P = keys_SGLP.shape[1], keys_SGLP.shape[3]
    heads = [outputs // P - 2 * G, G, G]
    q_STHP, k_STGP, v_STGP = qkv_STE.unflatten(2, (-1, P)).split(heads, dim=2)
    if q_norm_P is not None and k_norm_P is not None:
        q_STHP = F.rms_norm(q_STHP, (P,), q_norm_P.to(q_STHP.dtype), eps)
        k_STGP = F.rms_norm(k_STGP, (P,), k_norm_P.to(k_STGP.dtype), eps)
    place_ST = lengths_S[:, None] + torch.arange(T, device=lengths_S.device)
    cos_STP, sin_STP = (table_LJ[place_ST].repeat(1, 1, 2).to(qkv_STE.dtype) for table_LJ in (cos_LJ, sin_LJ))
    slot_S1 = torch.arange(S, device=lengths_S.device)[:, None]
    keys_SGLP[slot_S1, :, place_ST] = rope.rotate(k_STGP, cos_STP, sin_STP)
    values_SGLP[slot_S1, :, place_ST] = v_STGP
    return rope.rotate(q_STHP, cos_STP, sin_STP).contiguous()
