"""How a Mamba mixer starts: which rows of the attention land where, and what is drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mambify import HybridConfig
from mambify.errors import UnsupportedError
from mambify.mixers import MIXERS, AttentionMixer, Mixer
from mambify.mixers.base import MixerContext
from mambify.ops.causal_conv import causal_conv

H, G, P, D, N = 4, 2, 16, 64, 8


def config(**changes: Any) -> HybridConfig:
    facts = {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": P,
        "num_hidden_layers": 1,
        "mamba1_state_size": N,
        "mamba1_dt_rank": 3,
    }
    return HybridConfig(**facts | changes)


def attention(**changes: Any) -> AttentionMixer:
    torch.manual_seed(0)
    layer = AttentionMixer(config(**changes), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def started(name: str, layer: AttentionMixer, init: str = "identity", *, seed: int = 0, **changes: Any) -> Mixer:
    mixer = MIXERS[name](config(layer_mixers=[name], **changes), 0)
    mixer.init_from_attention(layer.weights(), start=init, generator=torch.Generator().manual_seed(seed))
    return mixer


def split(mixer: Mixer, x_BTD: Tensor) -> list[Tensor]:
    """z, x, B, C and dt as the projection gives them."""
    sizes = [H * P, *mixer.conv_split, H] if hasattr(mixer, "conv_split") else mixer.split
    return list(mixer.in_proj(x_BTD).split(sizes, -1))


@pytest.mark.parametrize("init", ["identity", "paper"])
@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_projections_land_in_their_place(name: str, init: str) -> None:
    layer = attention()
    mixer = started(name, layer, init)
    inputs = torch.randn(1, 5, D)
    z, x, B, C, dt = split(mixer, inputs)
    assert torch.allclose(x, layer.v_proj(inputs), atol=1e-5)
    assert torch.allclose(B, layer.k_proj(inputs), atol=1e-5)
    assert torch.allclose(C, layer.q_proj(inputs), atol=1e-5)
    assert torch.equal(mixer.out_proj.weight, layer.o_proj.weight)
    assert z.std() > 0.1
    assert dt.std() > 0.1
    identity = torch.tensor([0.0, 0.0, 0.0, 1.0])
    taps = mixer.conv1d.weight[:, 0]
    assert torch.equal(taps, identity.expand_as(taps)) == (init == "identity")
    assert taps.abs().max() <= (1.0 if init == "identity" else 0.5)


def test_biases_pass_through_the_convolution_of_mamba2() -> None:
    biased = {"attention_bias": True, "attention_output_bias": True}
    layer = attention(**biased)
    mixer = started("mamba2", layer, **biased)
    inputs = torch.randn(2, 5, D)
    _, x, B, C, _ = split(mixer, inputs)
    convolved, _ = causal_conv(
        torch.cat([x, B, C], -1),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        activation=None,
    )
    expected = torch.cat([layer.v_proj(inputs), layer.k_proj(inputs), layer.q_proj(inputs)], -1)
    assert torch.allclose(convolved, expected, atol=1e-5)
    assert torch.equal(mixer.out_proj.bias, layer.o_proj.bias)


def test_biases_of_mamba1() -> None:
    """Only x is convolved: v's bias enters there, repeated with its heads; q's and k's have their own place."""
    layer = attention(attention_bias=True)
    mixer = started("mamba1", layer, attention_bias=True)
    repeated = layer.v_proj.bias.view(G, P).repeat_interleave(H // G, 0).flatten()
    assert torch.equal(mixer.conv1d.bias, repeated)
    assert torch.equal(mixer.BC_bias, torch.cat([layer.k_proj.bias, layer.q_proj.bias]))
    assert mixer.out_proj.bias is None


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_head_norms_scale_keys_and_queries(name: str) -> None:
    layer = attention(qk_norm=True)
    mixer = started(name, layer, qk_norm=True)
    inputs = torch.randn(1, 5, D)
    _, _, B, C, _ = split(mixer, inputs)
    for actual, projection, norm in ((B, layer.k_proj, layer.k_norm), (C, layer.q_proj, layer.q_norm)):
        expected = projection(inputs).unflatten(-1, (-1, P)) * norm.weight
        assert torch.allclose(actual, expected.flatten(-2), atol=1e-4)


def test_head_norms_scale_biases_too() -> None:
    both = {"qk_norm": True, "attention_bias": True}
    layer = attention(**both)
    scaled = (layer.k_proj.bias.view(G, P) * layer.k_norm.weight).flatten()
    assert torch.allclose(started("mamba2", layer, **both).conv1d.bias[G * P : 2 * G * P], scaled)
    assert torch.allclose(started("mamba1", layer, **both).BC_bias[: G * P], scaled)


def test_distributions_of_mamba2() -> None:
    mixer = started("mamba2", attention())
    A, delta = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert ((A >= 1) & (A <= 16)).all() and A.std() > 1
    assert ((delta >= 0.99e-3) & (delta <= 0.101)).all() and delta.std() > 1e-3
    assert torch.equal(mixer.D, torch.ones(H))
    assert torch.equal(mixer.norm.weight, torch.ones(H * P))


def test_distributions_of_mamba1() -> None:
    mixer = started("mamba1", attention())
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, N + 1).expand(H * P, N))
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert ((delta >= 0.99e-3) & (delta <= 0.101)).all()
    assert delta.log().std() > 1  # log-uniform
    assert torch.equal(mixer.D, torch.ones(H * P))


@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_a_random_start_has_nothing_of_the_attention(name: str) -> None:
    biased = {"attention_bias": True, "attention_output_bias": True}
    one, other = attention(**biased), attention(**biased)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    first, second = (started(name, layer, "random", **biased).state_dict() for layer in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["in_proj.weight"].std() == pytest.approx(D**-0.5 / 3**0.5, rel=0.05)
    assert first["out_proj.weight"].std() == pytest.approx((H * P) ** -0.5 / 3**0.5, rel=0.05)
    assert not first["out_proj.bias"].any()


@pytest.mark.parametrize("init", ["identity", "paper", "random"])
@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_seed_decides(name: str, init: str) -> None:
    layer = attention()
    torch.manual_seed(1)
    one = started(name, layer, init, seed=5).state_dict()
    torch.manual_seed(2)
    same, other = started(name, layer, init, seed=5).state_dict(), started(name, layer, init, seed=6).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kv_head", range(G))
@pytest.mark.parametrize("block", range(P // N))
@torch.no_grad()
def test_sub_blocks_of_mamba1_meet_their_own(kv_head: int, block: int) -> None:
    """Query head h's sub-block j reads sub-block j of key/value head h // (H/G), in x and in B, and no other."""
    mixer = started("mamba1", attention())
    mixer.out_proj.weight.copy_(torch.eye(D))
    inputs = torch.randn(1, 6, D, generator=torch.Generator().manual_seed(0))
    before, _ = mixer(inputs, MixerContext(), None)
    expected = torch.zeros(H, P // N, dtype=torch.bool)
    expected[kv_head * (H // G) : (kv_head + 1) * (H // G), block] = True
    weight = mixer.in_proj.weight
    kept = weight.clone()
    for offset in (H * P, H * P + G * P):  # rows of x, rows of B
        start = offset + kv_head * P + block * N
        weight[start : start + N] *= -2.0
        after, _ = mixer(inputs, MixerContext(), None)
        weight.copy_(kept)
        changed = (after != before).view(-1, H, P // N, N).any(-1).any(0)
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("kv_head", range(G))
@torch.no_grad()
def test_heads_of_mamba2_meet_their_own(kv_head: int) -> None:
    mixer = started("mamba2", attention())
    mixer.out_proj.weight.copy_(torch.eye(D))
    inputs = torch.randn(1, 6, D, generator=torch.Generator().manual_seed(0))
    before, _ = mixer(inputs, MixerContext(), None)
    start = H * P + G * P + kv_head * P
    mixer.in_proj.weight[start : start + P] *= -2.0
    after, _ = mixer(inputs, MixerContext(), None)
    changed = (after != before).view(-1, H, P).any(-1).any(0)
    assert changed.tolist() == [h // (H // G) == kv_head for h in range(H)]


def test_shape_that_mamba1_cannot_take() -> None:
    with pytest.raises(UnsupportedError, match="multiple of 16; this model has 24"):
        MIXERS["mamba1"](config(head_dim=24, mamba1_state_size=16), 0)
