"""Every operation on a GPU, as picked by default, gives what its reference gives on the CPU, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mambify.ops.causal_conv import causal_conv
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.selective_scan import selective_scan
from mambify.ops.ssd import ssd_scan

# NaN in every allocation comes with PyTorch's deterministic mode, which warns of cumsum and cuBLAS on a GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

B, T, H, G, P, N = 2, 130, 4, 2, 32, 16
SEQ_IDX = torch.arange(T).div(47, rounding_mode="floor").expand(B, -1)

Operation = Callable[..., tuple[Tensor, ...]]
OPERATIONS: dict[str, tuple[Operation, Mapping[str, tuple[int, ...]]]] = {
    "ssd_scan": (
        lambda x, dt, A, B, C, D, S: ssd_scan(
            x,
            dt.float().abs(),
            -A.float().abs(),
            B,
            C,
            D.float(),
            initial_state_BHPN=S.float(),
            seq_idx_BT=SEQ_IDX.to(x.device),
        ),
        {
            "x": (B, T, G, P),
            "dt": (B, T, H),
            "A": (H,),
            "B": (B, T, G, N),
            "C": (B, T, H, N),
            "D": (H,),
            "S": (B, H, P, N),
        },
    ),
    "selective_scan": (
        lambda x, dt, A, B, C, D, S: selective_scan(
            x,
            dt.float().abs(),
            -A.float().abs(),
            B,
            C,
            D.float(),
            initial_state_BJMN=S.float(),
            seq_idx_BT=SEQ_IDX.to(x.device),
        ),
        {
            "x": (B, T, H, P),
            "dt": (B, T, H, P),
            "A": (H, P, N),
            "B": (B, T, H, N),
            "C": (B, T, H, N),
            "D": (H, P),
            "S": (B, H, P, N),
        },
    ),
    "causal_conv": (
        lambda x, weight, bias, state: causal_conv(
            x, weight, bias, initial_state_BCL=state, seq_idx_BT=SEQ_IDX.to(x.device)
        ),
        {"x": (B, T, P), "weight": (P, 4), "bias": (P,), "state": (B, P, 3)},
    ),
    "gated_rms_norm": (
        lambda y, z, weight: (gated_rms_norm(y, z, weight, 1e-5),),
        {"y": (B, T, H, P), "z": (B, T, H, P), "weight": (H, P)},
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_on_the_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    operation, shapes = OPERATIONS[name]
    values = {k: torch.randn(shape).to(dtype) for k, shape in shapes.items()}
    results: list[list[Tensor]] = []
    for device, kept in (("cpu", torch.float32), ("cuda", dtype)):
        given = {k: v.to(device, kept).requires_grad_() for k, v in values.items()}
        outputs = operation(**given)
        torch.manual_seed(1)
        cotangents = [torch.randn(v.shape).to(v) for v in outputs]
        grads = torch.autograd.grad(outputs, list(given.values()), cotangents)
        results.append([v.detach().cpu().float() for v in (*outputs, *grads)])
    assert len(results[0]) == len(results[1])
    for wanted, got in zip(*results, strict=True):
        assert got.isfinite().all()
        assert (got - wanted).norm() < tolerance * wanted.norm().clamp(min=1.0)
