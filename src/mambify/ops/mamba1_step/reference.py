"""New tokens of a Mamba1 mixer in pure torch: the operations they are made of. Letters as in the package's
``__init__``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.ops.backends import accumulation_dtype
from mambify.ops.conv_replay import reference as convolution
from mambify.ops.mamba1_step.weights import Mamba1Weights, StepConv
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing
from mambify.ops.selective_replay import reference as replay
from mambify.ops.selective_scan import reference as scan


def mamba1_step(
    x_STX: Tensor,
    z_STI: Tensor,
    dt_STE: Tensor,
    B_STGUN: Tensor,
    C_STJN: Tensor,
    weights: Mamba1Weights,
    state_SJMN: Tensor,
    ring: SelectiveRing | None,
    place: RingPlace,
    conv: StepConv | None,
) -> Tensor:
    """See :func:`mambify.ops.mamba1_step.mamba1_step`."""
    J, M, _ = weights.A_JMN.shape
    G, U = B_STGUN.shape[2:4]
    shared = J // (G * U)
    if weights.B_bias_GUN is not None:
        B_STGUN = B_STGUN + weights.B_bias_GUN
    if weights.C_bias_JN is not None:
        C_STJN = C_STJN + weights.C_bias_JN
    if conv is not None:
        x_STI = x_STX.unflatten(-1, (G, U * M)).repeat_interleave(shared, dim=-2).flatten(-2)
        x_STX = convolution.conv_replay(x_STI, conv.weight_IK, conv.bias_I, conv.ring_SRI, place, silu=True)
    dt_STJM = F.linear(dt_STE, weights.dt_IE).unflatten(-1, (J, M))
    x_STJM, z_STJM = x_STX.unflatten(-1, (J, M)), z_STI.unflatten(-1, (J, M))
    dt_bias_JM = weights.dt_bias_I.view(J, M)
    if ring is not None:
        y_STJM = replay.selective_replay(
            x_STJM, dt_STJM, weights.A_JMN, B_STGUN, C_STJN, weights.D_JM, dt_bias_JM, z_STJM, state_SJMN, ring, place
        )
        return y_STJM.flatten(2)
    exact = accumulation_dtype(x_STX, state_SJMN)
    delta_STJM = F.softplus(dt_STJM.to(exact) + dt_bias_JM.to(exact))
    B_STJN = B_STGUN.repeat_interleave(shared, dim=2).flatten(2, 3)
    now_SJMN, outputs = state_SJMN, []
    for t in range(x_STX.shape[1]):
        y_SJM, now_SJMN = scan.selective_scan_step(
            x_STJM[:, t].to(exact), delta_STJM[:, t], weights.A_JMN, B_STJN[:, t], C_STJN[:, t], weights.D_JM, now_SJMN
        )
        outputs.append(y_SJM * F.silu(z_STJM[:, t].to(exact)))
    active_S111 = place.active_S[:, None, None, None]
    state_SJMN.copy_(torch.where(active_S111, now_SJMN, state_SJMN))
    return torch.stack(outputs, 1).to(x_STX.dtype).masked_fill(~active_S111, 0).flatten(2)
