"""One query on a CPU goes through two matrix products; torch's own attention is the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from mambify.mixers import attention
from mambify.mixers.attention import single_query_attention
from mambify.model import HybridForCausalLM


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("keys", [1, 5, 64])
@pytest.mark.parametrize("mask_kind", ["none", "boolean", "added"])
def test_equals_torchs_attention(groups: int, keys: int, mask_kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, groups, keys, 8), torch.randn(2, groups, keys, 8)
    mask = None
    if mask_kind != "none":
        mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        mask[1, ..., : keys // 2] = False
    if mask is not None and mask_kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(single_query_attention(q, k, v, mask, 0.3), expected.transpose(1, 2))


def test_decoding_uses_it_and_training_does_not(
    tiny_hybrid: Callable[..., HybridForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = single_query_attention

    def counted(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "single_query_attention", counted)
    model = tiny_hybrid(["attention", "mamba2"])
    prompt = torch.tensor([[3, 4, 5]])
    model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert calls == 3  # the prompt is one call with three queries, then a call a token
    model(prompt[:, :1]).logits.sum().backward()
    assert calls == 3
