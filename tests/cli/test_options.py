from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table

from mambify.cli.console import print_table
from mambify.cli.distill import StageBars
from mambify.cli.options import parse_layers, pick_device
from mambify.cli.plans import layer_map
from mambify.distill.logs import Progress
from mambify.layer_map import ranges


@pytest.mark.parametrize(
    ("written", "layers"),
    [(None, None), ("none", []), ("3", [3]), ("1,3,5", [1, 3, 5]), ("0-2, 7", [0, 1, 2, 7])],
)
def test_layers(written: str | None, layers: list[int] | None) -> None:
    assert parse_layers(written) == layers


@pytest.mark.parametrize(
    ("layers", "written"),
    [([], "none"), ([4], "4"), ([0, 1, 2], "0-2"), ([1, 3, 5], "1, 3, 5"), ([0, 1, 7, 8], "0-1, 7-8")],
)
def test_ranges(layers: list[int], written: str) -> None:
    assert ranges(layers) == written


def test_layer_map_is_one_letter_a_layer() -> None:
    kinds = ["mamba2", "attention"] * 5 + ["sliding"]
    letters, legend = layer_map(kinds).plain.split("\n")
    assert letters == "MAMAMAMA MAS"
    assert legend == "M Mamba2 ×5, A attention ×5, S sliding-window attention ×1"


def test_the_default_device_is_the_gpu_where_there_is_one() -> None:
    assert pick_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"


def test_a_bar_a_stage_with_the_loss_beside_it() -> None:
    from rich.progress import Progress as Bars

    bars = Bars(console=Console(file=io.StringIO(), force_terminal=True))
    listen = StageBars(bars, pytest.fail)
    listen(Progress("01-align", 1, 4, {}))
    listen(Progress("01-align", 4, 4, {"loss": 0.5, "learning_rate": 1e-3}))
    listen(Progress("02-kd", 1, 8, {"loss": 0.25, "kl": 0.125}))
    align, kd = bars.tasks
    assert (align.description, align.completed, align.total) == ("01-align", 4, 4)
    assert align.fields["note"] == "loss 0.5"
    assert kd.fields["note"] == "loss 0.25  kl 0.125"


def test_lines_where_no_bars_are_drawn() -> None:
    """The first figures of a stage, the last ones, and between them some."""
    from rich.progress import Progress as Bars

    said: list[str] = []
    listen = StageBars(Bars(console=Console(file=io.StringIO())), said.append)
    listen(Progress("01-align", 1, 1200, {}))
    for step in (10, 20, 1200):
        listen(Progress("01-align", step, 1200, {"loss": step / 100}))
    listen(Progress("02-kd", 10, 20, {"loss": 0.25, "kl": 0.125}))
    assert said == [
        "01-align: step 10 of 1,200  loss 0.1",
        "01-align: step 1,200 of 1,200  loss 12",
        "02-kd: step 10 of 20  loss 0.25  kl 0.125",
    ]


@pytest.mark.parametrize("width", [100, 30])
def test_a_table_too_wide_is_shown_upright_and_nothing_is_cut(width: int) -> None:
    table = Table(title="a title", caption="a caption")
    for heading in ("first", "second", "third"):
        table.add_column(heading)
    table.add_row("a long first cell", "a long second cell", "a long third cell")
    table.add_row("1", "2", "3")
    out = io.StringIO()
    print_table(table, Console(file=out, width=width))
    shown = " ".join(out.getvalue().split())
    for words in ("a title", "a caption", "first", "a long first cell", "a long second cell", "a long third cell"):
        assert words in shown
    assert ("second a long second cell" in shown) == (width == 30)


def test_a_gpu_named_by_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == "cuda:1"
    assert pick_device("cuda") == "cuda"
    assert chosen == [torch.device("cuda:1")]
