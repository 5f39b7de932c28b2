"""A mixer's matrix times its values is what the mixer makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from mambify.mixers import AttentionMixer, MixerContext
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.mixers.matrices import attention_matrix, ssd_matrix
from mambify.model import HybridForCausalLM
from mambify.ops.causal_conv import causal_conv

MakeHybrid = Callable[..., HybridForCausalLM]


@pytest.mark.parametrize("num_tokens", [1, 17, 64])
def test_the_ssd_matrix_times_the_values_is_the_scan(tiny_hybrid: MakeHybrid, num_tokens: int) -> None:
    """Through gate, norm and output projection: the mixer's own output, from the matrix alone."""
    mixer = tiny_hybrid(("mamba2",)).model.layers[0].mixer
    assert isinstance(mixer, Mamba2Mixer)
    x_BTD = torch.randn(2, num_tokens, 64, generator=torch.Generator().manual_seed(0))
    matrix_BHTS = ssd_matrix(mixer, x_BTD)
    assert torch.equal(matrix_BHTS, matrix_BHTS.tril())
    z_BTI, xBC_BTC, _ = mixer.in_proj(x_BTD).split([64, sum(mixer.conv_split), 4], dim=-1)
    xBC_BTC, _ = causal_conv(xBC_BTC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    values_BHTP = xBC_BTC[..., : mixer.conv_split[0]].unflatten(-1, (2, 16)).transpose(1, 2).repeat_interleave(2, dim=1)
    y_BTHP = (matrix_BHTS @ values_BHTP).transpose(1, 2)
    made_BTD = mixer.out_proj(mixer.norm(y_BTHP, z_BTI.unflatten(-1, (4, 16))).flatten(2))
    torch.testing.assert_close(made_BTD, mixer(x_BTD, MixerContext(), None)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_the_attention_matrix_is_the_weights(tiny_hybrid: MakeHybrid, window: int | None) -> None:
    """Rows sum to one, nobody reads ahead or behind the window, and times the values it is the output."""
    changes = {} if window is None else {"layer_types": ["sliding_attention"], "sliding_window": window}
    model = tiny_hybrid(("attention",), **changes)
    mixer = model.model.layers[0].mixer
    assert isinstance(mixer, AttentionMixer)
    x_BTD = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    (context,), _ = model.model.layer_contexts(x_BTD)
    matrix_BHTS = attention_matrix(mixer, x_BTD, context)
    torch.testing.assert_close(matrix_BHTS.sum(-1), torch.ones(2, 4, 12))
    allowed = torch.ones(12, 12).tril().triu(-(window or 12) + 1)
    assert torch.equal(matrix_BHTS > 0, (allowed > 0).expand(2, 4, 12, 12))
    values_BHTP = mixer.v_proj(x_BTD).unflatten(-1, (2, 16)).transpose(1, 2).repeat_interleave(2, dim=1)
    made_BTD = mixer.o_proj((matrix_BHTS @ values_BHTP).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made_BTD, mixer(x_BTD, context, None)[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_makes_the_matrix(tiny_hybrid: MakeHybrid) -> None:
    mixer = tiny_hybrid(("mamba2",)).model.layers[0].mixer
    assert isinstance(mixer, Mamba2Mixer)
    matrix_BHTS = ssd_matrix(mixer, torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0)))
    F.mse_loss(matrix_BHTS, torch.zeros_like(matrix_BHTS)).backward()
    reached = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias"}
