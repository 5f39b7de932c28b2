"""Rotation of new queries and keys, and their places in the buffers, by every backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambify.ops.backends import HAS_TRITON
from mambify.ops.rope import rotate
from mambify.ops.rotate_kv import rotate_kv

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("H", "G", "P"), [(4, 2, 16), (9, 3, 24), (3, 3, 10)])
@pytest.mark.parametrize("T", [1, 3])
def test_new_tokens_go_behind_what_a_row_holds(backend: str, normed: bool, H: int, G: int, P: int, T: int) -> None:
    lengths, L = torch.tensor([0, 5, 12]), 16
    S = len(lengths)
    qkv = torch.randn(S, T, (H + 2 * G) * P)
    angle = torch.rand(L + 2, P // 2) * 6
    keys, values = torch.randn(S, G, L, P), torch.randn(S, G, L, P)
    norms = {"q_norm_P": torch.randn(P), "k_norm_P": torch.randn(P), "eps": 1e-5} if normed else {}

    q, k, v = qkv.unflatten(2, (-1, P)).split([H, G, G], 2)
    if normed:
        q, k = (F.rms_norm(x, (P,), norms[name], 1e-5) for x, name in ((q, "q_norm_P"), (k, "k_norm_P")))  # type: ignore[arg-type]
    position = lengths[:, None] + torch.arange(T)
    cos, sin = (torch.cat([part, part], -1)[position] for part in (angle.cos(), angle.sin()))
    q, k = rotate(q, cos, sin, backend="reference"), rotate(k, cos, sin, backend="reference")
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for row, length in enumerate(lengths.tolist()):
        wanted_keys[row, :, length : length + T] = k[row].transpose(0, 1)
        wanted_values[row, :, length : length + T] = v[row].transpose(0, 1)

    tensors = [t.to(DEVICE) for t in (qkv, angle.cos(), angle.sin(), keys, values, lengths)]
    found = rotate_kv(
        *tensors, **{n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in norms.items()}, backend=backend
    )
    assert found.shape == (S, T, H, P) and found.is_contiguous()
    for actual, wanted in ((found, q), (tensors[3], wanted_keys), (tensors[4], wanted_values)):
        assert (actual.cpu() - wanted).abs().max() < 1e-5


def test_what_does_not_belong_together_is_refused() -> None:
    qkv, table, keys = torch.randn(2, 1, 32), torch.randn(9, 4), torch.zeros(2, 1, 9, 8)
    lengths = torch.zeros(2, dtype=torch.long)
    for message, arguments in (
        ("are not those of heads", (qkv[..., :30], table, table, keys, keys, lengths)),
        ("cos_LJ must have shape", (qkv, table[:8], table, keys, keys, lengths)),
        ("sin_LJ must have shape", (qkv, table, table[:, :3], keys, keys, lengths)),
        ("lengths_S must have shape", (qkv, table, table, keys, keys, lengths[:1])),
        ("values_SGLP must have shape", (qkv, table, table, keys, keys[:, :, :8], lengths)),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_kv(*arguments)
    with pytest.raises(ValueError, match="both norms or none"):
        rotate_kv(qkv, table, table, keys, keys, lengths, q_norm_P=torch.ones(8))
