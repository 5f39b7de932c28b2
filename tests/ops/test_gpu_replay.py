"""Replay on a GPU, in bfloat16 at the sizes of real layers, against stepping on the CPU in float64."""

from __future__ import annotations

import pytest
import torch

from mambify.ops.ring import RingPlace, ring_capacity
from mambify.ops.ssd_replay import ssd_replay
from replaying import Conv, Mamba1, Mamba2, Replayed, StockMamba1, StockMamba2, advance

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]


def go_through(layer: Replayed, new: int, rounds: int = 6) -> None:
    for number in range(rounds):
        layer.set_active([(row + number) % 5 != 4 for row in range(layer.slots)])
        layer.verify(new)
        layer.accept([(number + row) % (new + 1) for row in range(layer.slots)], new)
    layer.finish()


@pytest.fixture(params=["8B", "135M", "tiny"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets the harness's sizes: H, G, P = N of Mamba2, and those of Mamba1 and the convolution that go with them."""
    H, G, P = {"8B": (32, 8, 128), "135M": (9, 3, 64), "tiny": (4, 2, 16)}[request.param]
    for name, size in {"H": H, "G": G, "P": P, "N": P}.items():
        monkeypatch.setattr(Mamba2, name, size)
    for name, size in {"G": G, "Q": H // G, "U": P // 16, "M": 16, "N": 16}.items():
        monkeypatch.setattr(Mamba1, name, size)
    stock = {"G": H, "heads_of_B": G, "heads_of_C": G}
    for name, size in stock.items():
        monkeypatch.setattr(StockMamba2, name, size)
    monkeypatch.setattr(StockMamba1, "M", H * P)
    monkeypatch.setattr(Conv, "C", (2 * G + H) * P)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("new", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("layer", [Mamba2, Mamba1, StockMamba2, StockMamba1, Conv])
@pytest.mark.usefixtures("sizes")
def test_as_stepping(layer: type[Replayed], new: int, eager: bool, dtype: torch.dtype) -> None:
    capacity = ring_capacity(new) if new > 5 else 16
    one = layer(most_new=new, capacity=capacity, eager=eager, dtype=dtype, device="cuda", backend="triton")
    go_through(one, new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("new", range(1, 18))
@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (StockMamba1, {"M": 1536}),
        (StockMamba1, {"M": 5120}),
        (StockMamba1, {"M": 8192}),
        (StockMamba2, {"H": 80, "G": 80, "P": 64, "N": 128, "heads_of_B": 1, "heads_of_C": 1}),
        (StockMamba2, {"H": 128, "G": 128, "P": 64, "N": 128, "heads_of_B": 8, "heads_of_C": 8}),
    ],
    ids=["mamba-130m", "mamba-2.8b", "mamba-7b", "mamba2-2.7b", "mamba2-7b"],
)
def test_published_shapes(
    layer: type[Replayed], sizes: dict[str, int], new: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of new tokens that speculation can ask for."""
    for name, size in sizes.items():
        monkeypatch.setattr(layer, name, size)
    go_through(layer(most_new=new, capacity=ring_capacity(new), dtype=dtype, device="cuda", backend="triton"), new)


@pytest.mark.parametrize("layer", [Mamba2, Mamba1, StockMamba2, StockMamba1, Conv])
@pytest.mark.parametrize("sizes", ["8B"], indirect=True)
def test_many_rows(layer: type[Replayed], sizes: str) -> None:
    """As many as change how the work is cut."""
    one = layer(slots=40, most_new=5, capacity=32, dtype=torch.bfloat16, device="cuda", backend="triton")
    go_through(one, 5, 8)


def test_a_token_that_forgets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Mamba2.draw

    def forgetful(layer: Mamba2, new: int) -> list[torch.Tensor]:
        x, dt, B, C = draw(layer, new)
        dt[:, 1] = 5000.0
        return [x / 5000, dt, B, C]

    monkeypatch.setattr(Mamba2, "draw", forgetful)
    go_through(Mamba2(most_new=5, dtype=torch.bfloat16, device="cuda"), 5)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("layer", [Mamba2, Mamba1])
def test_a_corrupted_entry_is_seen(layer: type[Mamba2], part: int) -> None:
    one = layer(most_new=5, dtype=torch.bfloat16, device="cuda")
    one.verify(5)
    one.accept([5, 0, 1], 5)
    at, _ = one.place.pending_places()
    one.ring.layer(0)[part][0, at[0, 1]] += 2.0
    with pytest.raises(AssertionError, match="off by"):
        one.verify(5)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("sizes", ["8B"], indirect=True)
def test_rounds_in_a_cuda_graph(new: int, sizes: str) -> None:
    """A recorded round, counts and folds included, gives the same bits as the launches, round after round."""
    one = Mamba2(slots=4, most_new=new, capacity=16, dtype=torch.bfloat16, device="cuda")
    A = one.A.to("cuda")
    static = [value.clone() for value in one.draw(new)]
    accepted = torch.zeros(4, dtype=torch.long, device="cuda")
    recorded = [one.state.clone(), *(part.clone() for part in one.ring)]
    places = [one.place, RingPlace.empty(4, new, device="cuda", capacity=16)]
    places[1].active_S.fill_(True)

    def round_of(state: torch.Tensor, ring: list[torch.Tensor], place: RingPlace) -> torch.Tensor:
        x, dt, B, C = static
        layer = type(one.ring)(*ring).layer(0)
        y = ssd_replay(x, dt.sigmoid(), A, B, C, None, state[0], layer, place)
        advance(place, accepted, new)
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        round_of(recorded[0], recorded[1:], places[1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = round_of(recorded[0], recorded[1:], places[1])
    recorded[0].copy_(one.state)
    places[1].head_S.zero_()
    places[1].pending_S.zero_()
    for number in range(24):
        for value, fresh in zip(static, one.draw(new), strict=True):
            value.copy_(fresh)
        accepted.copy_(torch.tensor([(number + row) % (new + 1) for row in range(4)]))
        places[1].active_S.copy_(torch.tensor([row != number % 6 for row in range(4)]))
        one.place.active_S.copy_(places[1].active_S)
        wanted = round_of(one.state, list(one.ring), one.place)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, wanted)
        assert torch.equal(recorded[0], one.state)
        assert torch.equal(places[1].pending_S, one.place.pending_S)


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """The last of so many rows that their states have more than 2³¹ entries is what it is alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    slots, H, G, P = 4200, 32, 8, 128
    place = RingPlace.empty(slots, 5, device="cuda", capacity=16)
    place.active_S[-1:] = True
    ring = [torch.zeros(slots, 16, *rest, device="cuda", dtype=torch.bfloat16) for rest in ((G, P), (G, P))]
    ring.append(torch.zeros(slots, 16, H, device="cuda"))
    state = torch.zeros(slots, H, P, P, device="cuda")
    state[-1].normal_()
    x, B = (torch.randn(1, 5, G, P, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    C, dt = torch.randn(1, 5, H, P, device="cuda", dtype=torch.bfloat16), torch.rand(1, 5, H, device="cuda")
    A = -torch.rand(H, device="cuda")
    wide = [value.expand(slots, *value.shape[1:]) for value in (x, dt, B, C)]
    from_type = type(Mamba2().ring)
    last = RingPlace(*(v[-1:].clone() for v in (place.head_S, place.pending_S, place.active_S)), 16, 5)
    alone = ssd_replay(x, dt, A, B, C, None, state[-1:].clone(), from_type(*(p[-1:].clone() for p in ring)), last)
    together = ssd_replay(wide[0], wide[1], A, wide[2], wide[3], None, state, from_type(*ring), place)
    assert (alone[0] - together[-1]).abs().max() < 1e-2 * alone.abs().max()
    assert not together[:-1].any()
