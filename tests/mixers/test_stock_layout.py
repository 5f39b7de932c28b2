"""The Mamba2 mixer is the stock one: its weights, key/value rows repeated, run in transformers' own module."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig
from transformers.cache_utils import DynamicCache
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
    GraniteMoeHybridRMSNormGated,
)

from mambify.mixers import Mixer, MixerContext

# Before it had groups, the stock norm went over all heads at once: another function, whatever the weights.
pytestmark = pytest.mark.skipif(
    "group_size" not in inspect.signature(GraniteMoeHybridRMSNormGated).parameters,
    reason="this version of transformers has no stock Mamba2 with a norm for each group",
)

NewMixer = Callable[..., Mixer]


def repeated(rows: Tensor, groups: int, heads: int) -> Tensor:
    """Gives every query head a copy of its key/value head's rows."""
    return rows.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)


def stock(mixer: Mixer) -> tuple[GraniteMoeHybridMambaLayer, GraniteMoeHybridConfig]:
    H, G, P = mixer.num_heads, mixer.num_groups, mixer.head_dim
    config = GraniteMoeHybridConfig(
        hidden_size=H * P // 2,
        num_hidden_layers=1,
        layer_types=["mamba"],
        mamba_n_heads=H,
        mamba_n_groups=H,
        mamba_d_state=P,
        mamba_d_head=P,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_proj_bias=False,
        mamba_conv_bias=True,
        mamba_chunk_size=8,
        rms_norm_eps=mixer.norm.eps,
        hidden_act="silu",
    )
    layer = GraniteMoeHybridMambaLayer(config, 0).eval()
    weights = {name: value.detach() for name, value in mixer.state_dict().items()}
    z, x, B, C, dt = weights["in_proj.weight"].split([H * P, G * P, G * P, H * P, H])
    weights["in_proj.weight"] = torch.cat([z, repeated(x, G, H), repeated(B, G, H), C, dt])
    for name in ("conv1d.weight", "conv1d.bias"):
        x, B, C = weights[name].split([G * P, G * P, H * P])
        weights[name] = torch.cat([repeated(x, G, H), repeated(B, G, H), C])
    layer.load_state_dict(weights)
    return layer, config


@pytest.fixture(params=["gqa", "mqa", "mha"])
def mixer(request: pytest.FixtureRequest, new_mixer: NewMixer) -> Mixer:
    mixer = new_mixer("mamba2", request.param, biased=False)
    H, P = mixer.num_heads, mixer.head_dim
    torch.manual_seed(0)
    mixer.in_proj = torch.nn.Linear(H * P // 2, len(mixer.in_proj.weight), bias=False)
    mixer.out_proj = torch.nn.Linear(H * P, H * P // 2, bias=False)
    return mixer


@torch.no_grad()
def test_prefill_and_steps(mixer: Mixer) -> None:
    layer, config = stock(mixer)
    x = torch.randn(2, 21, config.hidden_size)
    expected = layer(x)
    y, _ = mixer(x, MixerContext(), None)
    assert (y - expected).abs().max() <= 1e-4

    cache, state = DynamicCache(config=config), None
    for start, end in [(0, 17), *((t, t + 1) for t in range(17, 21))]:
        theirs = layer(x[:, start:end], cache_params=cache)
        ours, state = mixer(x[:, start:end], MixerContext(), state)
        assert (ours - theirs).abs().max() <= 1e-4
        assert (ours - expected[:, start:end]).abs().max() <= 1e-4


@torch.no_grad()
def test_left_padding(mixer: Mixer) -> None:
    layer, config = stock(mixer)
    x = torch.randn(2, 13, config.hidden_size)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    y, _ = mixer(x, MixerContext(padding_mask_BT=mask), None)
    expected = layer(x, attention_mask=mask)
    assert (y - expected)[mask.bool()].abs().max() <= 1e-4
