"""New tokens of Mamba1 in one launch: what the mixers make of them, stock and hybrid, whether they stand or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.mixers.base import MixerContext, RecurrentMixer, ReplayState
from mambify.mixers.mamba1 import Mamba1Mixer
from mambify.mixers.stock_mamba1 import StockMamba1Mixer
from mambify.ops.backends import HAS_TRITON
from mambify.ops.mamba1_step import Mamba1Weights, StepConv, mamba1_step
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing
from replaying import advance

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # the mode that gives NaN in allocations
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
SLOTS, MOST_NEW = 3, 3


def stock() -> StockMamba1Mixer:
    config = HybridConfig(
        hidden_size=16, num_hidden_layers=1, layer_mixers=["stock_mamba1"], intermediate_size=0, ssm_inner_size=44,
        ssm_state_size=5, ssm_dt_rank=3,
    )  # fmt: skip
    return StockMamba1Mixer(config, 0)


def hybrid() -> Mamba1Mixer:
    config = HybridConfig(
        hidden_size=16, num_attention_heads=6, num_key_value_heads=3, head_dim=16, num_hidden_layers=1,
        layer_mixers=["mamba1"], attention_bias=True, mamba1_state_size=8,
    )  # fmt: skip
    return Mamba1Mixer(config, 0)


def drawn(mixer: RecurrentMixer, dtype: torch.dtype) -> RecurrentMixer:
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer.to(DEVICE, dtype).requires_grad_(False)


def by_the_step(mixer: RecurrentMixer, u_STD: Tensor, state: ReplayState, stands: bool, backend: str) -> Tensor:
    """A mixer's output by way of the one operation."""
    assert isinstance(state.ring, SelectiveRing)
    ring = None if stands else state.ring
    if isinstance(mixer, StockMamba1Mixer):
        x, z = mixer.in_proj(u_STD).chunk(2, -1)
        x, _ = mixer.convolve(x, MixerContext(), state)
        dt, B, C = mixer.x_proj(x).split([mixer.dt_rank, mixer.state_size, mixer.state_size], -1)
        weights = Mamba1Weights(mixer.dt_proj.weight, mixer.dt_proj.bias, -mixer.A_log.exp()[None], mixer.D[None])
        B, C, conv = B[:, :, None, None], C[:, :, None], None
    else:
        assert isinstance(mixer, Mamba1Mixer) and mixer.BC_bias is not None
        z, x, B, C, dt = mixer.in_proj(u_STD).split(mixer.split, -1)
        J, N, G = state.ssm.shape[1], mixer.state_size, mixer.num_groups
        B_bias, C_bias = mixer.BC_bias.split(mixer.split[2:4])
        weights = Mamba1Weights(
            mixer.dt_proj.weight, mixer.dt_proj.bias, -mixer.A_log.exp().view(J, N, N), mixer.D.view(J, N),
            B_bias.view(G, -1, N), C_bias.view(J, N),
        )  # fmt: skip
        B, C = B.unflatten(-1, (G, -1, N)), C.unflatten(-1, (J, N))
        conv = StepConv(mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, state.conv)
    y = mamba1_step(x, z, dt, B, C, weights, state.ssm, ring, state.place, conv=conv, backend=backend)
    out: Tensor = mixer.out_proj(y)
    return out


@pytest.mark.parametrize("make", [stock, hybrid])
@pytest.mark.parametrize("stands", [True, False], ids=["stand", "may be rejected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_the_mixer(make: type[RecurrentMixer], stands: bool, dtype: torch.dtype, backend: str) -> None:
    """Beside the mixer's own replay, in the rounds of which states are folded."""
    mixer = drawn(make(), dtype)  # type: ignore[call-arg]
    place = RingPlace.empty(SLOTS, MOST_NEW, device=DEVICE, capacity=16, eager=stands)
    place.head_S.copy_(torch.tensor([0, 14, 7]))
    ours, theirs = (mixer.replay_state(SLOTS, place) for _ in range(2))
    for mine, own in zip(ours[:2], theirs[:2], strict=True):
        own.normal_()
        mine.copy_(own)
    for number in range(5):
        new = 1 if stands else 1 + number % MOST_NEW
        place.active_S.copy_(torch.tensor([True, number != 2, number > 3]))
        u_STD = torch.randn(SLOTS, new, 16).to(DEVICE, dtype)
        before = ours.ssm.clone()
        found = by_the_step(mixer, u_STD, ours, stands, backend)
        expected, _ = mixer(u_STD, MixerContext(), theirs)
        active, idle = place.active_S, ~place.active_S
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        assert (found - expected)[active].abs().max() < tolerance * expected.abs().max().clamp(min=1.0)
        assert torch.equal(ours.ssm[idle], before[idle])
        advance(place, torch.tensor([new, new if stands else 0, (new + 1) // 2], device=DEVICE), new)
    assert (ours.conv - theirs.conv).abs().max() == 0
    if not stands:
        for mine, own in zip((ours.ssm, *ours.ring), (theirs.ssm, *theirs.ring), strict=True):
            assert (mine - own).abs().max() < tolerance * own.abs().max().clamp(min=1.0)


def test_what_does_not_fit_is_refused() -> None:
    mixer = drawn(stock(), torch.float32)
    place = RingPlace.empty(2, 1, device=DEVICE, capacity=16)
    state = mixer.replay_state(2, place)
    u = torch.zeros(2, 1, 16, device=DEVICE)
    by_the_step(mixer, u, state, False, "auto")
    assert isinstance(state.ring, SelectiveRing)
    with pytest.raises(ValueError, match="state_SJMN"):
        by_the_step(mixer, u, state._replace(ssm=state.ssm[..., :4]), False, "auto")
    ring = state.ring._replace(delta=state.ring.delta[:, :8])
    with pytest.raises(ValueError, match=r"ring\.delta"):
        by_the_step(mixer, u, state._replace(ring=ring), False, "auto")
