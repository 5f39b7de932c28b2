"""A plain step of Mamba2 in one launch: the mixer's own step, and the kernel beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.mixers.base import MixerContext, RecurrentState
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.ops.backends import HAS_TRITON
from mambify.ops.conv_replay import load_window, read_window
from mambify.ops.mamba2_step import Mamba2Weights, mamba2_step
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import move_on

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # the mode that gives NaN in allocations
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
K = 4


def mixer_and_weights(H: int, G: int, P: int, dtype: torch.dtype) -> tuple[Mamba2Mixer, Mamba2Weights]:
    config = HybridConfig(
        hidden_size=32, num_attention_heads=H, num_key_value_heads=G, head_dim=P, num_hidden_layers=1,
        layer_mixers=["mamba2"], conv_kernel=K,
    )  # fmt: skip
    mixer = Mamba2Mixer(config, 0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    mixer = mixer.to(DEVICE, dtype)
    weights = Mamba2Weights(
        mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, mixer.dt_bias, -mixer.A_log.exp(), mixer.D,
        mixer.norm.weight.view(H, P), mixer.norm.eps,
    )  # fmt: skip
    return mixer, Mamba2Weights(*(v.detach() if isinstance(v, Tensor) else v for v in weights))


@pytest.mark.parametrize("sizes", [(4, 2, 16), (3, 1, 20), (3, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_as_the_mixer(sizes: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    H, G, P = sizes
    mixer, weights = mixer_and_weights(H, G, P, dtype)
    slots, channels = 3, sum(mixer.conv_split)
    place = RingPlace.empty(slots, 1, device=DEVICE, capacity=16)
    place.head_S.copy_(torch.tensor([0, 14, 7]))
    ring = torch.full((slots, 16, channels), float("nan"), device=DEVICE, dtype=dtype)
    state = RecurrentState(
        torch.randn(slots, channels, K - 1).to(DEVICE, dtype), torch.randn(slots, H, P, P).to(DEVICE)
    )
    load_window(ring, place, torch.arange(slots, device=DEVICE), state.conv)
    ssm = state.ssm.clone()
    for number in range(6):
        place.active_S.copy_(torch.tensor([True, number != 2, number > 3]))
        x = torch.randn(slots, 32).to(DEVICE, dtype)
        before = ssm.clone()
        out = mixer.out_proj(mamba2_step(mixer.in_proj(x), weights, ssm, ring, place, backend=backend).flatten(1))
        move_on(place, torch.zeros_like(place.head_S), None, plus=1, pends=False)
        expected, after = mixer(x[:, None], MixerContext(), state)
        active, idle = place.active_S, ~place.active_S
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        largest = expected.float().abs().max().clamp(min=1.0)
        assert (out[active].float() - expected[active, 0].float()).abs().max() < tolerance * largest
        assert torch.equal(ssm[idle], before[idle])
        assert not out[idle].any()
        state = RecurrentState(
            *(
                torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(after, state, strict=True)
            )
        )
        assert torch.equal(read_window(ring, place, K), state.conv)
        assert (ssm - state.ssm).abs().max() < (1e-4 if dtype == torch.float32 else 3e-2) * state.ssm.abs().max()


def test_what_does_not_fit_is_refused() -> None:
    mixer, weights = mixer_and_weights(4, 2, 16, torch.float32)
    channels = sum(mixer.conv_split)
    place = RingPlace.empty(2, 1, device=DEVICE, capacity=16)
    ring, state = torch.zeros(2, 16, channels, device=DEVICE), torch.zeros(2, 4, 16, 16, device=DEVICE)
    rows = torch.zeros(2, 64 + channels + 4, device=DEVICE)
    with pytest.raises(ValueError, match="zxBCdt_SE"):
        mamba2_step(rows[:, 1:], weights, state, ring, place)
    with pytest.raises(ValueError, match="channels are not those of"):
        mamba2_step(rows, weights, state[..., :9], ring, place)
    with pytest.raises(ValueError, match="ring_SRC"):
        mamba2_step(rows, weights, state, ring[:, :8], place)
    with pytest.raises(ValueError, match="norm_HP"):
        mamba2_step(rows, weights._replace(norm_HP=weights.norm_HP[:2]), state, ring, place)
