"""Products of weights laid out for a CPU: what the reference gives, of one copy for all who ask."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from mambify.ops.decode_linear import can_pack, decode_linear, decode_packed, pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="oneDNN packs nothing on this processor"
)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["alone", "side by side", "gated", "added", "biased"])
def test_the_references_product(rows: int, dtype: torch.dtype, form: str) -> None:
    """Odd heights and widths too."""
    heights = {"side by side": [31, 8, 8], "gated": [24, 24]}.get(form, [43])
    weights = [drawn(height, 70, dtype=dtype) for height in heights]
    biases = [drawn(height, dtype=dtype) if form != "alone" and height != 8 else None for height in heights]
    x, norm = drawn(rows, 70, dtype=dtype), 1 + 0.1 * drawn(70, dtype=dtype)
    settings = {"norm_D": norm, "eps": 1e-5, "gated": form == "gated"}
    sums = [drawn(rows, 43, dtype=dtype) if form == "added" else None for _ in range(2)]
    wanted = decode_linear(x, weights, biases, backend="reference", add_to_MO=sums[0], **settings)  # type: ignore[arg-type]
    with torch.inference_mode():
        found = decode_packed(x, pack(weights, biases), add_to_MO=sums[1], **settings)  # type: ignore[arg-type]
    assert found is sums[1] or sums[1] is None
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max()


def test_one_copy_for_the_same_weights() -> None:
    """As long as anyone holds it, and not after the weights have changed."""
    weights = [drawn(16, 32), drawn(8, 32)]
    first = pack(weights, [None, None])
    assert pack(list(weights), [None, None]) is first
    assert pack(weights[:1], [None]) is not first
    weights[1].mul_(2)
    second = pack(weights, [None, None])
    assert second is not first
    x = drawn(3, 32)
    with torch.inference_mode():
        assert torch.allclose(decode_packed(x, second)[:, 16:], 2 * decode_packed(x, first)[:, 16:], atol=1e-5)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
