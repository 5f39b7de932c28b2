"""``bench export``: the stock model is the export, both say the same, and torch code is never called kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from mambify.bench import clock, exported
from mambify.bench.decode_steps import drawn_model
from mambify.bench.registry import BENCHMARKS, run_benchmark
from mambify.bench.shapes import config_of_shape
from mambify.cli.main import main
from mambify.errors import InvalidOptionError, MambifyError
from mambify.export import export_transformers
from tiny import byte_tokenizer, llama


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_SECONDS", 0.0)
    monkeypatch.setattr(clock, "_MIN_REPEATS", 1)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(exported, "_NEW", 12)


def test_both_say_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run_benchmark("export", device="cpu")
    assert [row["way"] for row in result["results"]] == ["generate", "ours"] * 2
    for row in result["results"]:
        assert "error" not in row
        assert row["whole_ms"] > row["ms"] > 0 and row["tokens_per_second"] > 0
        if row["way"] == "ours":
            assert row["same_tokens"] == 1.0 and "code" not in row
        else:
            assert row["logits_apart"] < 1e-5 and row["code"] == exported.TORCH
    BENCHMARKS["export"].table(result)
    BENCHMARKS["export"].plot(result, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_a_student_of_ones_own(tmp_path: Path) -> None:
    drawn_model("tiny", "cpu", attention=0.25).save_pretrained(tmp_path / "student")
    assert main(["bench", "export", "--device", "cpu", "--target", str(tmp_path / "student")]) == 0
    with pytest.raises(InvalidOptionError, match="nothing in 'export' is called 'tiny'"):
        run_benchmark("export", device="cpu", only="tiny", target=str(tmp_path / "student"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_model_is_the_one_that_transformers_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    student = drawn_model("tiny", "cpu", attention=0.5).to(dtype)
    export_transformers(student, tmp_path / "stock", split_heads=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    ours, theirs = exported.stock_of(student, split=2).state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name


def test_another_function_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "split_for_kernels", lambda _: 1)
    whole = exported.stock_of

    def other(*arguments: object, **options: int) -> object:
        stock = whole(*arguments, **options)
        for layer in stock.model.layers:
            if getattr(layer, "mamba", None) is not None:  # of attention it is None, or not there at all
                layer.mamba.norm.group_size = layer.mamba.intermediate_size  # as before transformers 5.23
        return stock

    monkeypatch.setattr(exported, "stock_of", other)
    rows = run_benchmark("export", device="cpu")["results"]
    for row in rows:
        assert ("error" in row) == (row["way"] == "generate"), row.get("error")
    assert "of their spread apart from ours: this is another function" in rows[0]["error"]
    BENCHMARKS["export"].table({"machine": {"device": "", "transformers": ""}, "kernels": {}, "results": rows})


def test_a_version_without_norms_for_groups_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported.stock_code, "GraniteMoeHybridRMSNormGated", lambda hidden_size, eps: None)
    pair = exported._Pair.__new__(exported._Pair)
    with pytest.raises(MambifyError, match=r"before 5\.23\.0 is another function"):
        pair.measure(exported.Case("tiny", "tiny", 1, 16, exported.GENERATE))


def test_which_code_the_stock_mixer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own wrapper, of a package that stands in for mamba-ssm and one for causal-conv1d."""
    code = exported.stock_code
    packages = {"mamba2_selective_state_update": "mamba_kernels", "mamba2_chunk_scan": "mamba_kernels"}
    for done, name in enumerate(exported.FUNCTIONS):
        assert exported.code_of(exported.kernels_in_use()) == (exported.IN_PART if done else exported.TORCH)
        package = ModuleType(packages.get(name, "conv_kernels"))
        exec(f"def {name}(x): return x", package.__dict__)
        monkeypatch.setitem(sys.modules, package.__name__, package)
        wrapped = use_kernel_func_from_hub_with_fallback(name, package.__name__)(getattr(code, name).__wrapped__)
        monkeypatch.setattr(code, name, wrapped)
    used = exported.kernels_in_use()
    assert used["causal_conv1d_update"] == "conv_kernels"
    assert used["mamba2_selective_state_update"] == "mamba_kernels"
    assert exported.code_of(used) == exported.KERNELS


def test_heads_are_cut_as_the_convolution_wants_them() -> None:
    split = {name: exported.split_for_kernels(config_of_shape(name, attention=0.5)) for name in ("tiny", "135M", "8B")}
    assert split == {"tiny": 2, "135M": 8, "8B": 1}


def test_the_models_of_the_table_can_be_exported(tmp_path: Path) -> None:
    """A teacher whose layers all keep attention has an export too, so that it may be compared as well."""
    llama(len(byte_tokenizer()), num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    rows = run_benchmark("export", device="cpu", target=str(tmp_path / "teacher"))["results"]
    assert all(row.get("same_tokens", 1.0) == 1.0 and "error" not in row for row in rows)
