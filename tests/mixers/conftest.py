"""Small mixers with every parameter random, and a loop over tokens in float64 that says what each should give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify import HybridConfig
from mambify.mixers import MIXERS, Mixer

#: H, G: grouped, one, and as many key/value heads as query heads
HEADS = {"gqa": (4, 2), "mqa": (4, 1), "mha": (3, 3)}


def make_mixer(name: str, heads: str = "gqa", *, biased: bool = True, seed: int = 0) -> Mixer:
    H, G = HEADS[heads]
    config = HybridConfig(
        hidden_size=24,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=16,
        num_hidden_layers=1,
        mamba1_state_size=8,
        mamba1_dt_rank=3,
        rms_norm_eps=1e-3,
        attention_bias=biased,
        attention_output_bias=biased,
        layer_mixers=[name],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mixer = MIXERS[name](config, 0)
        mixer.init_random()
        with torch.no_grad():
            for parameter_name, parameter in mixer.named_parameters():
                if parameter_name in ("A_log", "dt_bias", "dt_proj.bias"):
                    parameter.uniform_(-2.0, 0.5)
                else:
                    parameter.normal_(0.0, 0.5)
    return mixer


def mamba2_loop(mixer: Mixer, x_TD: Tensor) -> Tensor:
    """One row through a Mamba2 mixer, a token and a head at a time."""
    p = {name: value.double() for name, value in mixer.named_parameters()}
    H, G, P = mixer.num_heads, mixer.num_groups, mixer.head_dim
    T, eps = len(x_TD), mixer.norm.eps
    z, xBC, dt = (x_TD.double() @ p["in_proj.weight"].T).split([H * P, 2 * G * P + H * P, H], -1)
    taps = p["conv1d.weight"][:, 0]
    K = taps.shape[1]
    rows = []
    for t in range(T):
        inputs = [xBC[t - K + 1 + k] * taps[:, k] for k in range(K) if t - K + 1 + k >= 0]
        rows.append(F.silu(sum(inputs) + p["conv1d.bias"]))
    x, B, C = torch.stack(rows).split([G * P, G * P, H * P], -1)
    heads = []
    for h in range(H):
        g = h // (H // G)
        own, shared = slice(h * P, h * P + P), slice(g * P, g * P + P)
        S, ys = torch.zeros(P, P, dtype=torch.float64), []
        for t in range(T):
            delta = F.softplus(dt[t, h] + p["dt_bias"][h])
            S = torch.exp(-p["A_log"][h].exp() * delta) * S + delta * torch.outer(x[t, shared], B[t, shared])
            y = (S @ C[t, own] + p["D"][h] * x[t, shared]) * F.silu(z[t, own])
            ys.append(y * torch.rsqrt(y.square().mean() + eps) * p["norm.weight"][own])
        heads.append(torch.stack(ys))
    return torch.cat(heads, -1) @ p["out_proj.weight"].T + p["out_proj.bias"]


def mamba1_loop(mixer: Mixer, x_TD: Tensor) -> Tensor:
    """One row through a Mamba1 mixer, a token and a sub-head at a time."""
    p = {name: value.double() for name, value in mixer.named_parameters()}
    H, G, P = mixer.num_heads, mixer.num_groups, mixer.head_dim
    N, R, T = mixer.state_size, mixer.dt_rank, len(x_TD)
    z, x, B, C, dt = (x_TD.double() @ p["in_proj.weight"].T).split([H * P, G * P, G * P, H * P, R], -1)
    B, C = B + p["BC_bias"][: G * P], C + p["BC_bias"][G * P :]
    delta = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    taps, K = p["conv1d.weight"][:, 0], 4
    blocks = []
    for h in range(H):
        g = h // (H // G)
        for j in range(P // N):
            own = slice(h * P + j * N, h * P + j * N + N)
            shared = slice(g * P + j * N, g * P + j * N + N)
            S, ys = torch.zeros(N, N, dtype=torch.float64), []
            for t in range(T):
                past = [x[t - K + 1 + k, shared] * taps[own, k] for k in range(K) if t - K + 1 + k >= 0]
                u, d = F.silu(sum(past) + p["conv1d.bias"][own]), delta[t, own]
                S = torch.exp(-d[:, None] * p["A_log"][own].exp()) * S + torch.outer(d * u, B[t, shared])
                ys.append((S @ C[t, own] + p["D"][own] * u) * F.silu(z[t, own]))
            blocks.append(torch.stack(ys))
    return torch.cat(blocks, -1) @ p["out_proj.weight"].T + p["out_proj.bias"]


@pytest.fixture(scope="session")
def new_mixer() -> Callable[..., Mixer]:
    return make_mixer


@pytest.fixture(scope="session")
def loop() -> Callable[[Mixer, Tensor], Tensor]:
    """What a mixer should give for one row ``[T, D]``, in float64."""
    loops = {MIXERS["mamba2"]: mamba2_loop, MIXERS["mamba1"]: mamba1_loop}
    return lambda mixer, x_TD: loops[type(mixer)](mixer, x_TD)
