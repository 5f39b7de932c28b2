"""The benchmark of operations compares like with like, and says where it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.table import Table

import mambify
from mambify.bench import (
    cases,
    clock,
    decode,
    laws,
    model_cases,
    ops,
    replay_cases,
    run_benchmark,
    speculate_shapes,
    synthesize,
    train,
    verify,
)
from mambify.bench.case import Case, Inputs, Shape
from mambify.bench.peers import peer
from mambify.bench.registry import BENCHMARKS, names_of
from mambify.bench.sheet import Sheet
from mambify.cli.main import main
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel
from mambify.ops.backends import HAS_TRITON
from tiny import byte_tokenizer, llama

# Odd sizes, several key/value heads, more than one chunk of the scan.
SHAPE = Shape("tiny", 2, 140, 6, 2, 16, V=100)
ROUND = Shape("tiny", 2, 5, 6, 2, 16)
MAKERS = [(SHAPE, maker) for maker in cases.MAKERS.values()]
MAKERS += [(ROUND, maker) for maker in replay_cases.REPLAY_MAKERS.values()]


def _inits(device: str, sheet: Sheet, only: str | None = None) -> None:
    sheet.facts |= {"teacher": "none", "budget": {"train": 0}}
    scores = {"untrained": {"kl": 2.0, "perplexity_ratio": 3.0, "top1_agreement": 0.5}}
    sheet.fill(["paper"], lambda name: {"scores": scores}, about=lambda name: {"init": name})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """In place of the real one, which says more."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), byte_tokenizer()
    llama(len(tokenizer), num_hidden_layers=2, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return mambify.load(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, teacher: LoadedModel) -> None:
    monkeypatch.setattr(ops, "SHAPES", {"cpu": (SHAPE,)})
    monkeypatch.setattr(ops, "REPLAY_SHAPES", {"cpu": (ROUND,)})
    monkeypatch.setattr(clock, "_SECONDS", 1e-9)
    monkeypatch.setattr(clock, "_AT_MOST", 0.0)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(clock, "_MATMUL", {"cpu": (64, torch.float32)})
    monkeypatch.setattr(synthesize, "CASES", {"cpu": [synthesize.Case(way, 2, 2, 4) for way in synthesize._WAYS]})
    monkeypatch.setattr(synthesize, "load", lambda *_, **__: teacher)
    # what these give is for tests/bench/test_decode.py and test_decode_benchmarks.py
    monkeypatch.setattr(decode, "CASES", {"cpu": [case for case in decode.CASES["cpu"] if case.part == "verify"][:1]})
    monkeypatch.setattr(verify, "CASES", {"cpu": verify.CASES["cpu"][:1]})
    monkeypatch.setattr(speculate_shapes, "CASES", {"cpu": speculate_shapes.CASES["cpu"][1:2]})
    monkeypatch.setattr(laws, "SIZES", {"cpu": laws.Size(2, 4, 50, 50)})
    # minutes with the real teacher; test_inits.py runs it with a tiny one
    monkeypatch.setitem(BENCHMARKS, "inits", BENCHMARKS["inits"]._replace(run=_inits))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("shape", "maker"), MAKERS, ids=[*cases.MAKERS, *replay_cases.REPLAY_MAKERS])
def test_ours_and_theirs_give_the_same_values_and_gradients(
    shape: Shape, maker: Callable[..., Case], dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    case = maker(shape, lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype))

    def ours(inputs: Inputs) -> torch.Tensor:
        return case.ours(inputs, "auto")

    for operation in case.peers.values():
        pairs = [(ours(case.inputs), operation(case.inputs))]
        if case.exact:
            continue  # drawn by other random numbers
        if not case.step:
            pairs += zip(ops.gradients(ours, case), ops.gradients(operation, case), strict=True)
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape
            assert (mine.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


def test_the_result_says_where_it_ran() -> None:
    seen: list[tuple[int, int]] = []
    result = run_benchmark("ops", device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(MAKERS), len(MAKERS))
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["copy_bytes_per_second"] > 1e6
    assert {row["operation"] for row in result["results"]} >= {"ssd_scan", "ssd_step", "selective_scan", "causal_conv"}
    for row in result["results"]:
        assert row["ms"] > 0
        assert row["difference"] < 1e-4
        for other in row["peers"].values():
            assert other["ms"] > 0
            assert other["difference"] < 1e-4 or row["operation"] == "draw_tokens"


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_ways_that_replay_replaces_give_the_same() -> None:
    case = replay_cases.REPLAY_MAKERS["ssd_replay"](ROUND, torch.randn)
    expected = case.ours(case.inputs, "reference")
    stored = replay_cases.StatePerToken(case.inputs["state"], ROUND.T)
    copied = replay_cases.CopyAndRecompute(case.inputs["state"], 3)
    for _ in range(2):  # a run leaves what it begins from
        for other in (stored, copied):
            assert (other(case.inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (copied.kept[:, 0] - stored.states[:, 2]).abs().max() < 1e-6


def test_no_time_is_given_for_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
        right = torch.nn.functional.silu(gate) * up
        return right if backend == "reference" else right.detach() + 0 * right + 0.01 * gate.square()

    monkeypatch.setattr(model_cases, "swiglu", wrong)
    rows = run_benchmark("ops", device="cpu", only="swiglu")["results"]
    assert [row["pass"] for row in rows] == ["fwd", "fwd+bwd"]
    for row in rows:
        assert "off by" in row["red"]
        assert "ms" not in row
    shown = ops.table({"results": rows, "machine": {"device": "here", "copy_bytes_per_second": 1.0}})
    assert list(shown.columns[3].cells) == ["red", "red"]


def test_a_peer_that_is_not_installed_is_named() -> None:
    case = Case("x", "y", {"v": torch.ones(3)}, lambda i, _: i["v"] * 2, {"none": _absent}, step=True)
    (row,) = ops._rows(case, "cpu", torch.float32)
    assert "no_such_package" in row["peers"]["none"]["missing"]
    assert row["ms"] > 0


def test_a_peer_that_cannot_be_recorded_is_timed_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "device_seconds_of", lambda function, device: 1.0)
    monkeypatch.setattr(ops, "seconds_of", lambda function, device: 2.0)
    peers = {name: lambda i: i["v"] * 2 for name in ("recorded", "waits")}
    case = Case("x", "y", {"v": torch.ones(3)}, lambda i, _: i["v"] * 2, peers, step=True, unrecorded=("waits",))
    (row,) = ops._rows(case, "cpu", torch.float32)
    assert row["ms"] == row["peers"]["recorded"]["ms"] == 1e3
    assert row["peers"]["waits"]["ms"] == 2e3


def _absent(inputs: Inputs) -> torch.Tensor:
    return peer("no_such_package", "operation")(inputs)


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "ops.json"
    drawn = tmp_path / "ops.svg"
    assert main(["bench", "ops", "--device", "cpu", "--json", str(file), "--plot", str(drawn)]) == 0
    assert "<svg" in drawn.read_text()
    shown = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["benchmark"] == "ops"
    assert all(row["operation"] in shown for row in result["results"])
    for name in BENCHMARKS.keys() - {"ops"}:
        drawn = tmp_path / f"{name}.svg"
        assert main(["bench", name, "--device", "cpu", "--plot", str(drawn)]) == 0
        assert "<svg" in drawn.read_text()
    assert main(["bench", "train", "--device", "cpu", "--only", "headline"]) == 0
    capsys.readouterr()
    assert main(["bench", "train", "--device", "cpu", "--only", "nothing"]) == 2
    assert "nothing in 'train' is called 'nothing'" in capsys.readouterr().err
    assert main(["bench", "all", "--device", "cpu", "--only", "ops"]) == 2
    assert main(["bench", "all", "--device", "cpu", "--plot", "x.svg"]) == 2
    assert main(["bench", "ops", "--device", "cpu", "--plot", "x.gif"]) == 2
    assert "name it instead of 'all'" in (refused := capsys.readouterr().err) and ".svg, .png" in refused
    for name, benchmark in BENCHMARKS.items():  # each of them has run above
        monkeypatch.setitem(BENCHMARKS, name, benchmark._replace(run=_one_row, table=lambda _: Table()))
    assert main(["bench", "all", "--device", "cpu", "--json", "-"]) == 0
    every = json.loads(capsys.readouterr().out)["benchmarks"]
    assert [one["benchmark"] for one in every] == list(BENCHMARKS)


def _one_row(device: str, sheet: Sheet, only: str | None) -> None:
    sheet.fill([0], lambda _: {}, about=lambda _: {})


def test_names() -> None:
    assert names_of("all") == list(BENCHMARKS)
    with pytest.raises(InvalidOptionError, match="did you mean 'ops'"):
        names_of("op")


def test_training_steps_are_measured() -> None:
    result = run_benchmark("train", device="cpu")
    assert {row["stage"] for row in result["results"]} == {"align", "kd"}
    for row in result["results"]:
        assert row["fits"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["sequences"] * row["context"] / row["ms"])
        assert row["flops_per_token"] > 0


def test_a_plain_step_computes_the_same_loss() -> None:
    """What sharing and chunks save is measured against the same work."""
    losses = []
    for plain in (False, True):
        case = train.Case("x", "kd", "tiny", 32, 2, plain=plain)
        torch.manual_seed(0)
        teacher = train._teacher(case, "cpu").float()
        module = train._module(case, teacher)
        ids = torch.arange(64).view(2, 32)
        batch = {"input_ids": ids, "labels": ids}
        losses.append(float(module.accumulate_gradients(module, batch, torch.Tensor.backward).metrics["kl"]))
    # The plain one counts the last position of a row too, which has no next token.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_steps_of_several_processes(sharded: bool, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    environment = os.environ | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "mambify", "bench", "train", "--only", "processes", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert (result["processes"], result["sharded"]) == (2, sharded)
    for row in result["results"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 1e3 * row["sequences"] * row["context"] / row["ms"])


def test_other_benchmarks_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "ops", "--device", "cpu"]) == 2
    assert "only 'bench train' runs in several processes" in capsys.readouterr().err
