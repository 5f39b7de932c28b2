"""Replay is stepping: outputs of new tokens, states after what was accepted, whatever was accepted in which row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.conv_replay import conv_replay
from mambify.ops.gated_norm import GatedNorm, gated_rms_norm
from mambify.ops.ring import RingPlace, ring_capacity
from mambify.ops.selective_replay import SelectiveRing, selective_fold, selective_replay
from mambify.ops.ssd_replay import SSDRing, ssd_fold, ssd_replay
from replaying import Conv, Mamba1, Mamba2, Replayed, StockMamba1, StockMamba2, advance

if HAS_TRITON:
    from mambify.ops.selective_replay import triton as selective_kernels
    from mambify.ops.ssd_replay import triton as ssd_kernels

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # the mode that gives NaN in allocations
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
LAYERS = [Mamba2, Mamba1, StockMamba2, StockMamba1, Conv]
ROWS, MOST_NEW = 3, 5


class Rounds(RuleBasedStateMachine):
    """Rounds in any order: drafts of any length, any counts accepted, rows that rest, folds in between."""

    layer_type: type[Replayed]

    @initialize(seed=st.integers(0, 2**31), eager=st.booleans(), capacity=st.sampled_from([16, 32]))
    def begin(self, seed: int, eager: bool, capacity: int) -> None:
        torch.manual_seed(seed)
        self.layer = self.layer_type(slots=ROWS, most_new=MOST_NEW, capacity=capacity, eager=eager)

    @rule(
        new=st.integers(1, MOST_NEW),
        active=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
        accepted=st.lists(st.integers(0, MOST_NEW), min_size=ROWS, max_size=ROWS),
    )
    def round(self, new: int, active: list[bool], accepted: list[int]) -> None:
        self.layer.set_active(active)
        self.layer.verify(new)
        self.layer.accept([min(count, new) for count in accepted], new)

    @rule()
    def fold(self) -> None:
        self.layer.fold()  # type: ignore[attr-defined]

    def teardown(self) -> None:
        if hasattr(self, "layer"):
            self.layer.finish()


def machine(layer: type[Replayed]) -> type:
    case = type(layer.__name__, (Rounds,), {"layer_type": layer}).TestCase
    case.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    return case


TestMamba2 = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")(machine(Mamba2))
TestMamba1 = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")(machine(Mamba1))
TestConv = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")(machine(Conv))


def go_through(layer: Replayed, new: int, rounds: int) -> None:
    """Rounds that accept everything in row 0, nothing in row 1, something in the others; row 2 rests at times."""
    for number in range(rounds):
        layer.set_active([row != 2 or number % 3 != 1 for row in range(layer.slots)])
        layer.verify(new)
        layer.accept([new, 0, *((number + row) % (new + 1) for row in range(2, layer.slots))], new)
    layer.finish()


@pytest.mark.parametrize("new", range(1, 18))
@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_of_new_tokens(layer: type[Replayed], new: int) -> None:
    go_through(layer(most_new=new, capacity=ring_capacity(new), device=DEVICE, backend="reference"), new, 8)


# Folded in each round, or as places run short: then in rings so small that it happens within these rounds.
@pytest.mark.parametrize(
    ("new", "eager", "capacity", "rounds"),
    [(1, True, 32, 4), (2, True, 16, 4), (3, False, 16, 6), (5, False, 16, 4), (5, False, 32, 6), (5, True, 32, 3)],
)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels(layer: type[Replayed], new: int, eager: bool, capacity: int, rounds: int) -> None:
    go_through(layer(most_new=new, capacity=capacity, eager=eager, device=DEVICE, backend="triton"), new, rounds)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_with_seventeen_new_tokens(layer: type[Replayed]) -> None:
    go_through(layer(most_new=17, capacity=64, device=DEVICE, backend="triton"), 17, 3)


@pytest.mark.parametrize("sizes", [(3, 1, 64, 64), (1, 1, 16, 16), (1, 1, 128, 16), (2, 1, 20, 24), (2, 2, 16, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba2_sizes(sizes: tuple[int, int, int, int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip("HGPN", sizes, strict=True):
        monkeypatch.setattr(Mamba2, name, size)
    go_through(Mamba2(most_new=3, eager=True, device=DEVICE, backend=backend), 3, 3)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 70, 16), (3, 1, 2, 16, 16), (1, 4, 2, 5, 20)])  # G, Q, U, M, N
@pytest.mark.parametrize("backend", BACKENDS)
def test_mamba1_sizes(sizes: tuple[int, int, int, int, int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip("GQUMN", sizes, strict=True):
        monkeypatch.setattr(Mamba1, name, size)
    go_through(Mamba1(most_new=3, eager=True, device=DEVICE, backend=backend), 3, 3)


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_widths(width: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "K", width)
    go_through(Conv(most_new=4, device=DEVICE, backend=backend), 4, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision(layer: type[Replayed], backend: str, dtype: torch.dtype) -> None:
    # Two tokens: for more the kernels take products in bfloat16, which Triton's interpreter gets wrong.
    go_through(layer(most_new=2, dtype=dtype, device=DEVICE, backend=backend), 2, 4)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("sizes", [(4, 2, 16, 16), (2, 1, 48, 80), (2, 1, 64, 128)])
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("new", "capacity"), [(5, 16), (5, 32), (17, 64)])
def test_products(
    sizes: tuple[int, int, int, int], stock: bool, new: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bfloat16 kernel of many tokens, in float16 as the interpreter knows it: what is float32 goes in as halves."""
    for name, size in zip("HGPN", sizes, strict=True):
        monkeypatch.setattr(Mamba2, name, size)
    if stock:
        for name, count in {"G": sizes[0], "heads_of_B": sizes[1], "heads_of_C": sizes[1]}.items():
            monkeypatch.setattr(Mamba2, name, count)
    plan = ssd_kernels._plan
    monkeypatch.setattr(ssd_kernels, "_plan", lambda *given, **how: plan(*given, **how)._replace(products=True))
    go_through(Mamba2(most_new=new, capacity=capacity, dtype=torch.float16, device=DEVICE, backend="triton"), new, 3)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_of_a_head(backend: str, head_dim: int, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and norm as part of it are gate and norm behind it, in a kernel or not; the rest stays what it is."""
    if products:
        if backend == "reference":
            pytest.skip("a kernel's")
        plan = ssd_kernels._plan
        monkeypatch.setattr(ssd_kernels, "_plan", lambda *given, **how: plan(*given, **how)._replace(products=True))
    torch.manual_seed(0)
    S, T, H, G, P, N = 3, 4, 4, 2, head_dim, 24
    dtype = torch.float16 if products else torch.float32
    x, B = (torch.randn(S, T, G, size, device=DEVICE, dtype=dtype) for size in (P, N))
    dt, C = torch.rand(S, T, H, device=DEVICE), torch.randn(S, T, H, N, device=DEVICE, dtype=dtype)
    z = torch.randn(S, T, 2 * H * P, device=DEVICE, dtype=dtype)[:, :, : H * P].unflatten(-1, (H, P))
    norm = GatedNorm(z, torch.randn(H, P, device=DEVICE, dtype=dtype), 1e-5)
    A, D = -torch.rand(H, device=DEVICE), torch.randn(H, device=DEVICE)
    places = [RingPlace.empty(S, T, device=DEVICE, capacity=16) for _ in range(2)]
    states = [torch.full((S, H, P, N), 0.5, device=DEVICE) for _ in range(2)]
    rings = [SSDRing.zeros(1, S, 16, H=H, G=G, P=P, N=N, dtype=dtype, device=DEVICE).layer(0) for _ in range(2)]
    for _ in range(6):  # until a state is folded
        apart, within = (
            ssd_replay(x, dt, A, B, C, D, state, ring, place, norm=given, backend=backend)
            for state, ring, place, given in zip(states, rings, places, (None, norm), strict=True)
        )
        for place in places:
            place.active_S.copy_(torch.tensor([True, True, False]))
            advance(place, torch.tensor([4, 2, 0], device=DEVICE), T)
        wanted = gated_rms_norm(apart, *norm, backend="reference")
        assert within.dtype == dtype
        torch.testing.assert_close(within, wanted, rtol=1e-3 if products else 1e-5, atol=2e-3 if products else 1e-5)
    assert torch.equal(*states)
    assert all(map(torch.equal, *rings))
    with pytest.raises(ValueError, match="norm's weight"):
        ssd_replay(
            x, dt, A, B, C, D, states[0], rings[0], places[0], norm=norm._replace(weight_HP=norm.weight_HP[:1]),
            backend=backend,
        )  # fmt: skip


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("layer", [Mamba1, StockMamba1])
def test_tiles_of_many_rows(layer: type[Mamba1], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, as everywhere here, have programs of their own size."""
    assert selective_kernels._blocks(3, 8, layer.M, 16)[:2] == (1, 8)
    monkeypatch.setattr(selective_kernels, "_BUSY", 0)
    assert selective_kernels._blocks(3, 8, layer.M, 16)[:2] == ((4, 8) if layer is Mamba1 else (1, 32))
    go_through(layer(device=DEVICE, backend="triton"), 5, 4)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_forgets_everything(backend: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if products:
        if backend == "reference":
            pytest.skip("a kernel's")
        plan = ssd_kernels._plan
        monkeypatch.setattr(ssd_kernels, "_plan", lambda *given, **how: plan(*given, **how)._replace(products=True))
    draw = Mamba2.draw

    def forgetful(layer: Mamba2, new: int) -> list[torch.Tensor]:
        x, dt, B, C = draw(layer, new)
        dt[:, 1] = 5000.0
        return [x / 5000, dt, B, C]

    monkeypatch.setattr(Mamba2, "draw", forgetful)
    layer = Mamba2(most_new=3, dtype=torch.float16 if products else torch.float32, device=DEVICE, backend=backend)
    go_through(layer, 3, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("layer", [Mamba2, Mamba1])
def test_a_corrupted_entry_is_seen(layer: type[Mamba2], part: int, backend: str) -> None:
    """Of x, B and Δ, in the outputs of the next round and in the state after a fold."""
    for fold in (False, True):
        one = layer(most_new=3, device=DEVICE, backend=backend)
        one.verify(3)
        one.accept([3, 0, 1], 3)
        at, _ = one.place.pending_places()
        one.ring.layer(0)[part][0, at[0, 1]] += 0.5
        with pytest.raises(AssertionError, match="off by"):
            one.finish() if fold else one.verify(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_corrupted_window_is_seen(backend: str) -> None:
    layer = Conv(most_new=3, device=DEVICE, backend=backend)
    layer.verify(3)
    layer.accept([3, 0, 1], 3)
    layer.ring[0, layer.place.head_S[0] - 1] += 0.5
    with pytest.raises(AssertionError, match="off by"):
        layer.verify(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_layers_are_folded_at_once(backend: str) -> None:
    layers = [Mamba2(device=DEVICE, backend=backend) for _ in range(3)]
    for layer in layers:
        layer.place = layers[0].place
        layer.verify(5)
    counts = [2, 0, 5]
    for layer in layers:
        layer.plain = torch.stack([layer.states[count][row] for row, count in enumerate(counts)])
    place = layers[0].place
    advance(place, torch.tensor(counts, device=DEVICE), 5)
    place.active_S[2] = False
    ring = SSDRing(*(torch.cat(parts) for parts in zip(*(layer.ring for layer in layers), strict=True)))
    state = torch.cat([layer.state for layer in layers])
    before = state.clone()
    A_LH = torch.stack([layer.A for layer in layers]).to(DEVICE)
    ssd_fold(state, A_LH, ring, place, backend=backend)
    place.settle()
    assert place.pending_S.tolist() == [0, 0, 5]
    assert torch.equal(state[:, 1:], before[:, 1:])  # nothing was accepted, or the row rests
    for number, layer in enumerate(layers):
        assert (state[number, 0].cpu() - layer.plain[0]).abs().max() < 1e-5


def test_the_first_rows_are_rows_of_their_own() -> None:
    layer = Mamba2(slots=4, device=DEVICE)
    place, ring = layer.place.first(2), layer.ring.layer(0).first(2)
    x, dt, B, C = (value[:2] for value in layer.draw(5))
    before = [buffer.clone() for buffer in layer.buffers]
    ssd_replay(x, dt, layer.A.to(DEVICE), B, C, None, layer.state[0, :2], ring, place)
    advance(place, torch.tensor([1, 2], device=DEVICE), 5)
    assert layer.place.pending_S.tolist() == [1, 2, 0, 0]
    for buffer, old in zip(layer.buffers, before, strict=True):
        assert torch.equal(buffer[2:], old[2:])
    assert not torch.equal(layer.ring.x[0, :2], before[1][:2])


def test_places() -> None:
    place = RingPlace.empty(2, 5, device="cpu", capacity=16)
    place.active_S.fill_(True)
    assert place.folds_above(5) == 6
    for _ in range(2):
        advance(place, torch.tensor([5, 3]), 5)
    assert place.pending_S.tolist() == [10, 6]
    advance(place, torch.tensor([4, 4]), 5)  # the first row has folded its ten
    assert place.pending_S.tolist() == [4, 10]
    assert place.head_S.tolist() == [14, 10]
    advance(place, torch.tensor([5, 0]), 5)
    assert place.head_S.tolist() == [3, 10]
    at, known = place.pending_places()
    assert at[0][known[0]].tolist() == [10, 11, 12, 13, 14, 15, 0, 1, 2]
    assert [ring_capacity(new) for new in (1, 5, 16, 17)] == [32, 32, 32, 64]


def test_what_does_not_fit_is_refused() -> None:
    for capacity, most_new in ((8, 2), (24, 5), (16, 9), (16, 0)):
        with pytest.raises(ValueError, match="power of two of at least"):
            RingPlace.empty(2, most_new, device="cpu", capacity=capacity)
    layer = Mamba2()
    x, dt, B, C = layer.draw(5)
    ring = layer.ring.layer(0)

    def call(place: RingPlace = layer.place, ring: SSDRing = ring, backend: str = "auto", new: int = 5) -> None:
        given = (x[:, :new], dt[:, :new], layer.A, B[:, :new], C[:, :new], None)
        ssd_replay(*given, layer.state[0], ring, place, backend=backend)

    with pytest.raises(InvalidOptionError, match="no backend 'tritn'"):
        call(backend="tritn")
    with pytest.raises(ValueError, match="1 to 4 new tokens, got 5"):
        call(RingPlace.empty(3, 4, device="cpu", capacity=16))
    with pytest.raises(ValueError, match="head_S"):
        call(RingPlace.empty(2, 5, device="cpu", capacity=16))
    with pytest.raises(ValueError, match=r"ring\.x"):
        call(RingPlace.empty(3, 5, device="cpu", capacity=32))
    with pytest.raises(ValueError, match="G dividing H"):
        ssd_replay(x, dt[..., :3], layer.A[:3], B, C[:, :, :3], None, layer.state[0, :, :3], ring, layer.place)
    with pytest.raises(ValueError, match="A_LH"):
        ssd_fold(layer.state, layer.A, layer.ring, layer.place)
    conv = Conv()
    with pytest.raises(ValueError, match="need 19 places"):
        conv_replay(*conv.draw(5), torch.zeros(40, 15), None, conv.ring, conv.place)
    with pytest.raises(InvalidOptionError, match="no activation"):
        conv_replay(*conv.draw(5), conv.weight, None, conv.ring, conv.place, activation="relu")  # type: ignore[arg-type]
    one = Mamba1()
    with pytest.raises(ValueError, match="A_LJMN"):
        selective_fold(one.state, one.A, one.ring, one.place)  # type: ignore[arg-type]
    x, dt, B, C = one.draw(5)
    wrong = SelectiveRing.zeros(1, 3, 16, J=8, M=8, G=3, U=2, N=16, dtype=torch.float32, device="cpu").layer(0)
    B = torch.zeros(3, 5, 3, 2, 16)
    with pytest.raises(ValueError, match="G·U dividing J"):
        selective_replay(x, dt, one.A, B, C, None, one.state[0], wrong, one.place)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_refuse_what_they_could_not_write_into() -> None:
    layer = Mamba2(device=DEVICE, backend="triton")
    x, dt, B, C = layer.draw(5)
    state = layer.state[0].transpose(-1, -2)
    with pytest.raises(ValueError, match="must be contiguous"):
        ssd_replay(
            x, dt, layer.A.to(DEVICE), B, C, None, state, layer.ring.layer(0), layer.place, backend="triton"
        )  # fmt: skip
