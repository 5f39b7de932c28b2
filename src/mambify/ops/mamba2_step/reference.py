"""One token of a Mamba2 mixer in pure torch: the operations it is made of. Letters as in the package's ``__init__``."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import accumulation_dtype
from mambify.ops.conv_replay import reference as conv
from mambify.ops.gated_norm import reference as norm
from mambify.ops.ring import RingPlace
from mambify.ops.ssd import reference as ssd


def mamba2_step(
    zxBCdt_SE: Tensor,
    conv_CK: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    norm_HP: Tensor,
    eps: float,
    state_SHPN: Tensor,
    ring_SRC: Tensor,
    place: RingPlace,
    groups: int,
) -> Tensor:
    """See :func:`mambify.ops.mamba2_step.mamba2_step`."""
    H, P, N = state_SHPN.shape[1:]
    exact = accumulation_dtype(zxBCdt_SE, state_SHPN)
    z_SI, xBC_SC, dt_SH = zxBCdt_SE.split([H * P, len(conv_CK), H], dim=-1)
    xBC_SC = conv.conv_replay(xBC_SC[:, None], conv_CK, conv_bias_C, ring_SRC, place, silu=True)[:, 0]
    x_SGP, B_SGN, C_SHN = (
        part.unflatten(-1, (count, -1))
        for part, count in zip(xBC_SC.split([groups * P, groups * N, H * N], dim=-1), (groups, groups, H), strict=True)
    )
    delta_SH = torch.nn.functional.softplus(dt_SH.to(exact) + dt_bias_H.to(exact))
    y_SHP, after_SHPN = ssd.ssd_step(x_SGP, delta_SH, A_H, B_SGN, C_SHN, D_H, state_SHPN)
    active_S111 = place.active_S[:, None, None, None]
    state_SHPN.copy_(torch.where(active_S111, after_SHPN, state_SHPN))
    out_S1HP = norm.gated_rms_norm(y_SHP[:, None], z_SI.unflatten(-1, (1, H, P)), norm_HP, eps)
    return out_S1HP.masked_fill(~active_S111, 0)[:, 0]
