"""What is asked for wrongly: one clear line, status 2, nothing written. What fails: one line, status 1."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mambify
from mambify.cli import main as main_module
from mambify.errors import MambifyError, OutputWriteError

from .conftest import Result, Run


def assert_refused(result: Result, *said: str, status: int = 2) -> None:
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith("mambify: error: ")
    assert result.err.count("\n") == 1
    for words in said:
        assert words in result.err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "fresh" / "out"


def test_unknown_teacher(run: Run, out: Path) -> None:
    result = run("convert", "no/such-teacher-anywhere", "--out", out)
    assert_refused(result, "'no/such-teacher-anywhere'", "smollm2")
    assert not out.parent.exists()


def test_unknown_teacher_that_is_no_hub_id_either(run: Run) -> None:
    assert_refused(run("info", "smolm2"), "'smolm2' is no directory", "smollm2")
    assert_refused(run("info", ""), "no model has an empty name")


def test_wrong_family(run: Run, gpt2: Path, out: Path) -> None:
    result = run("convert", gpt2, "--out", out)
    assert_refused(result, "architecture 'gpt2'", "llama", "mistral", "qwen2", "qwen3", "docs/families.md")
    assert not out.parent.exists()
    assert_refused(run("info", gpt2), "architecture 'gpt2'")


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan"])
def test_attention_out_of_range(run: Run, teacher: Path, out: Path, share: str) -> None:
    result = run("convert", teacher, "--attention", share, "--out", out)
    assert_refused(result, f"attention {float(share)} is out of range", "0 to 1")
    assert not out.parent.exists()


def test_layer_out_of_range(run: Run, teacher: Path, out: Path) -> None:
    result = run("convert", teacher, "--attention-layers", "1,4", "--out", out)
    assert_refused(result, "layer 4 is out of range", "0 to 3")
    assert not out.parent.exists()


@pytest.mark.parametrize("layers", ["1,x", "", "1-", "-1", "3-1"])
def test_layers_that_are_no_list(run: Run, teacher: Path, layers: str) -> None:
    assert_refused(run("convert", teacher, f"--attention-layers={layers}", "--dry-run"), "no list of layers")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mixer", "mamba3"], "unknown mixer 'mamba3': did you mean 'mamba"),
        (["--init", "identty"], "did you mean 'identity'"),
        (["--dtype", "float31"], "unknown dtype 'float31'"),
    ],
)
def test_unknown_choices(run: Run, teacher: Path, out: Path, options: list[str], said: str) -> None:
    assert_refused(run("convert", teacher, "--out", out, *options), said)
    assert not out.parent.exists()


def test_no_place_for_the_student(run: Run, teacher: Path) -> None:
    assert_refused(run("convert", teacher), "--out DIR")


def test_output_not_empty(run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    # Known before the teacher is looked for: this one does not exist.
    result = run("convert", "no/such-teacher", "--out", tmp_path)
    assert_refused(result, f"{tmp_path} is not empty: choose another path")
    result = run("synthesize", "no/such-teacher", "--tokens", "1k", "--out", tmp_path)
    assert_refused(result, f"{tmp_path} is not empty: choose another path")
    for options in ([], ["--overwrite"]):
        assert_refused(run("quickstart", "--out", tmp_path, *options), f"{tmp_path} is not empty", "choose another")
        result = run("convert", "no/such-teacher", "--out", tmp_path, *options)
        assert_refused(result, f"{tmp_path} is not empty", "choose another")
        result = run("synthesize", "no/such-teacher", "--tokens", "1k", "--out", tmp_path, *options)
        assert_refused(result, f"{tmp_path} is not empty", "choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOverwrite:
    """What a command reads, and where it was started, is never replaced."""

    @pytest.fixture
    def model(self, student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A student, from the directory beside it."""
        (student.parent / "here").mkdir()
        monkeypatch.chdir(student.parent / "here")
        return student

    @pytest.mark.parametrize("command", [["convert"], ["export"], ["export", "--format", "gguf"], ["pack"]])
    def test_the_model_itself(self, run: Run, model: Path, command: list[str]) -> None:
        before = _contents(model.parent)
        for out in (model, model.parent):
            result = run(command[0], model, "--out", out, "--overwrite", *command[1:])
            assert_refused(result, f"{out} would be replaced", "choose another path")
        assert _contents(model.parent) == before

    def test_the_target_of_a_draft(self, run: Run, model: Path, text: Path) -> None:
        before = _contents(model.parent)
        ask = ["draft", model, "--data", text, "--overwrite", "--out"]
        assert_refused(run(*ask, model), f"{model} would be replaced, and {model} is in use")
        assert_refused(run(*ask, text), f"{text} would be replaced, and {text} is in use")
        assert _contents(model.parent) == before

    def test_a_draft_stays_until_all_is_known_to_be_right(
        self, run: Run, teacher: Path, text: Path, tmp_path: Path
    ) -> None:
        old = tmp_path / "draft" / "old"
        old.parent.mkdir()
        old.write_text("mine")
        (old.parent / "modeling_mambify.py").write_text("import mambify")
        ask = ["draft", teacher, "--data", text, "--overwrite", "--out", old.parent]
        assert_refused(run(*ask, "--layers", 9), "9 layers cannot be cut from a model of 4: choose 1 to 4")
        assert_refused(run(*ask, "--vocabulary", 10**6), "1 to 299 words")
        assert_refused(run(*ask, "data.heldout=none.txt"), "none.txt")
        assert old.read_text() == "mine"

    def test_what_a_recipe_reads(
        self, run: Run, recipe: Path, teacher: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = _contents(recipe.parent) | _contents(teacher)
        result = run("distill", recipe, f"output={teacher}", "--overwrite", "--json")
        assert_refused(result, f"{teacher} is not empty, and mambify replaces only what it made")
        monkeypatch.setattr("mambify.io._is_ours", lambda directory: True)
        for read, out in ((teacher, teacher), (text, text), (text, text.parent)):
            result = run("distill", recipe, f"output={out}", "--overwrite", "--json")
            assert_refused(result, f"{out} would be replaced, and {read} is in use there")
        assert _contents(recipe.parent) | _contents(teacher) == before

    def test_the_current_directory(
        self, run: Run, recipe: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "here" / "inner"
        here.mkdir(parents=True)
        monkeypatch.chdir(here)
        commands = [
            ["convert", teacher, "--out"],
            ["synthesize", teacher, "--tokens", "1k", "--out"],
            ["quickstart", "--out"],
        ]
        for command in commands:
            assert_refused(run(*command, here.parent, "--overwrite"), f"{here.parent} would be replaced")
        result = run("distill", recipe, f"output={here.parent}", "--overwrite", "--json")
        assert_refused(result, f"{here.parent} would be replaced")
        assert here.is_dir()


def test_an_output_that_cannot_be(run: Run, teacher: Path, recipe: Path, text: Path) -> None:
    """Known before the teacher is looked for, where that is not needed to know it."""
    commands = [
        ["convert", "no/such-teacher", "--out"],
        ["export", "no/such-model", "--out"],
        ["export", "no/such-model", "--format", "gguf", "--out"],
        ["pack", "no/such-model", "--out"],
        ["synthesize", "no/such-teacher", "--tokens", "1k", "--out"],
        ["quickstart", "--out"],
        ["draft", teacher, "--data", text, "--out"],
    ]
    for command in commands:
        assert_refused(run(*command, text / "x"), f"{text} is no directory that can be written", status=1)
    result = run("distill", recipe, f"output={text / 'x'}")
    assert_refused(result, f"{text} is no directory that can be written", status=1)


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path, text: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"teacher: {teacher}\n"
        f"data: {{train: {text}, context_length: 32}}\n"
        "stages: [{kind: align, tokens: 1k, batch_tokens: 64}]\n"
        f"output: {tmp_path / 'run'}\nreport_to: []\n"
    )
    return path


class TestRecipes:
    def test_unreadable(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("distill", tmp_path / "none.yaml"), "cannot read recipe", "No such file")
        assert_refused(run("distill", tmp_path), "cannot read recipe", "directory")
        broken = tmp_path / "broken.yaml"
        broken.write_text("teacher: [")
        assert_refused(run("distill", broken), "is not YAML: line 1: ")
        broken.write_bytes(b"\xff\xfe\x00")
        assert_refused(run("distill", broken), "broken.yaml")

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("student.atention=0.5", "unknown key 'student.atention': did you mean 'attention'?"),
            ("stages.0.learning_rat=1", "did you mean 'learning_rate'?"),
            ("sede=1", "unknown key 'sede': did you mean 'seed'?"),
            ("stages.0.trainer={gradient_checkpoint: true}", "did you mean 'gradient_checkpointing'?"),
            ("stages.0.trainer={optim: no}", "stage align: "),
            ("stages.0.tokens=1", "less than the"),
            ("stages.0.batch_tokens=33", "no whole number of sequences"),
            ("stages.0.schedule=cosin", "stage align: "),
            ("stages.3.tokens=1k", "'3' is not one of the entries"),
            ("seed", "key.path=value"),
            ("student.attention=1.5", "student.attention"),
            ("student.attention=1.0", "nothing"),
            ("student.attention_layers=[9]", "layer 9 is out of range"),
            ("data.train=nowhere.txt", "nowhere.txt"),
            ("teacher=no/such-teacher", "no/such-teacher"),
            ("stages.0.tokens=many", "stages.0.tokens: 'many' is no whole number: write it like 512, 20k"),
            ("stages.0.tokens=1.2.3", "'1.2.3' is no whole number"),
            ("stages.0.kind=algin", "no kind of stage 'algin': choose align, mixing"),
            ("student.layers=0", "student.layers: "),
            ("data.train=[", "override 'data.train=[': the value is not YAML: line 1: "),
            ("report_to=[none-such]", "none-such is not supported"),
            ("seed=-1", "seed: "),
            ("seed=4294967296", "seed: "),
        ],
    )
    def test_wrong_keys_and_values(self, run: Run, recipe: Path, tmp_path: Path, override: str, said: str) -> None:
        assert_refused(run("distill", recipe, override, "--json"), said)
        assert not (tmp_path / "run").exists()

    def test_output_that_is_no_run(self, run: Run, recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "kept").write_text("mine")
        assert_refused(run("distill", recipe), "is not empty and no run")  # before anything is loaded
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
        assert_refused(run("distill", recipe, f"output={recipe}"), f"{recipe} is not empty and no run")


class TestCheckpoints:
    def test_truncated(self, run: Run, student: Path, tmp_path: Path) -> None:
        weights = student / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = run("convert", student, "--attention", "0", "--out", tmp_path / "out", "--json")
        assert_refused(result, "model.safetensors", "truncated")
        (student / "checksums.json").unlink()  # and without the checksums, too
        result = run("convert", student, "--attention", "0", "--out", tmp_path / "out", "--json")
        assert_refused(result, "truncated or malformed")
        assert not (tmp_path / "out").exists()

    def test_tampered(self, run: Run, student: Path) -> None:
        weights = student / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        assert_refused(run("generate", student, "hi"), "model.safetensors is not the file that was saved")

    def test_weights_missing(self, run: Run, student: Path) -> None:
        (student / "model.safetensors").unlink()
        assert_refused(run("generate", student, "hi"), "lacks model.safetensors")

    def test_a_directory_that_is_no_model(self, run: Run, tmp_path: Path) -> None:
        assert_refused(run("info", tmp_path), "no config.json")

    def test_a_config_that_cannot_be_read(self, run: Run, student: Path) -> None:
        (student / "config.json").write_text("{")
        assert_refused(run("info", student), "config.json")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """While open, no file may grow past ``size``: the system refuses the write itself, wherever it comes from."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    @pytest.mark.parametrize("size", [100, 1_000, 30_000])  # the shim, the configuration, the weights
    def test_the_old_student_stays(self, run: Run, teacher: Path, student: Path, size: int) -> None:
        before = {path.name: path.read_bytes() for path in student.iterdir()}
        with full_after(size):
            result = run("convert", teacher, "--attention", "0", "--out", student, "--overwrite", "--json")
        assert_refused(result, "cannot write", str(student), "File too large", status=1)
        assert {path.name: path.read_bytes() for path in student.iterdir()} == before
        assert [path.name for path in student.parent.iterdir()] == [student.name]
        assert mambify.load(student).model.num_converted == 2

    def test_no_space_left(self, run: Run, teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("mambify.model.HybridForCausalLM.save_pretrained", full)
        result = run("convert", teacher, "--attention", "0", "--out", student, "--overwrite", "--json")
        assert_refused(result, str(student), "No space left on device", status=1)
        monkeypatch.undo()
        assert mambify.load(student).model.num_converted == 2

    @pytest.mark.parametrize("size", [500, 20_000, 50_000])  # metrics, trained weights, optimizer
    def test_a_run_stops_and_the_same_command_continues_it(self, run: Run, recipe: Path, size: int) -> None:
        directory = recipe.parent / "run"
        command = ["distill", recipe, "--json", "checkpoint_every=2", "log_every=1"]
        with full_after(size):
            result = run(*command)
        assert_refused(result, "cannot write", str(directory), status=1)
        assert not (directory / "student").exists()
        result = run(*command)
        assert result.status == 0, result.err
        assert mambify.load(directory / "student").model.num_converted == 2


class TestEvaluate:
    def test_tokenizer_that_does_not_match(
        self, run: Run, student: Path, other_teacher: Path, text: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "figures.json"
        result = run("evaluate", student, "--teacher", other_teacher, "--text", text, "--json", file)
        assert_refused(result, "do not share a tokenizer")
        assert not file.exists()

    def test_nothing_to_evaluate_on(self, run: Run, student: Path) -> None:
        assert_refused(run("evaluate", student), "--text FILE", "--tasks NAMES")

    def test_tasks(self, run: Run, student: Path, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'mambify[eval]'")
        ask = ["evaluate", student, "--tasks"]
        assert_refused(run(*ask, "arc_esy", "--limit", 3), "no task 'arc_esy'", "did you mean 'arc_easy'?")
        assert_refused(run(*ask, "copaa", "--data-dir", tmp_path), "from files: did you mean 'copa'?")
        assert_refused(run(*ask, "copa", "--data-dir", tmp_path / "none"), "no data directory")
        assert_refused(run(*ask, "copa,,piqa"), "'copa,,piqa' is no list of tasks")
        assert_refused(run("evaluate", student, "--limit", 3), "--limit is for tasks and pairs", "--tasks NAMES")
        assert_refused(run(*ask, "copa", "--limit", 0), "'--limit'", "1")

    def test_text_that_is_not_there(self, run: Run, student: Path, tmp_path: Path) -> None:
        assert_refused(run("evaluate", student, "--text", tmp_path / "none.txt"), "none.txt")
        assert_refused(run("evaluate", student, "--data", tmp_path / "none"), "none", "synthesize")

    def test_blocks_longer_than_the_positions(
        self, run: Run, teacher: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr("mambify.families.load.load", load)
        result = run("evaluate", teacher, "--text", text, "--context-length", 257)
        assert_refused(result, "257 tokens at once pass the 256 positions", str(teacher), "at most 256")

    def test_pairs_that_are_none(self, run: Run, student: Path, text: Path, tmp_path: Path) -> None:
        assert_refused(run("evaluate", student, "--preferences", tmp_path / "none.jsonl"), "none.jsonl")
        assert_refused(run("evaluate", student, "--preferences", text), "known file types are .jsonl and .json")

    def test_text_that_is_not_text(self, run: Run, student: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xff\xff")
        assert_refused(run("evaluate", student, "--text", tmp_path / "a.txt"), "not UTF-8")

    @pytest.mark.parametrize("option", ["--max-tokens", "--batch-size"])
    def test_numbers_below_one(self, run: Run, student: Path, text: Path, option: str) -> None:
        assert_refused(run("evaluate", student, "--text", text, option, 0), f"'{option}'", "1")

    def test_figures_that_cannot_be_written(self, run: Run, student: Path, text: Path, tmp_path: Path) -> None:
        result = run("evaluate", student, "--text", text, "--json", tmp_path)
        assert_refused(result, "is a directory", status=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda:77"], "no device 'cuda:77' here"),
        (["--no-chat", "--system", "be kind"], "--system needs a chat"),
        (["--dtype", "int4"], "unknown dtype"),
        (["--min-p", "2"], "min_p must be 0 to 1"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["--stop", ""], "an empty stop string"),
        (["--draft", "no/such/model", "--num-draft-tokens", "17"], "num_draft_tokens must be 1 to 16, not 17"),
        (["--max-new-tokens", "300"], "pass the 256 positions"),
        (["--seed", "-1"], "'--seed'"),
        (["--seed", "4294967296"], "'--seed'"),
        (["--num-draft-tokens", "4"], "--num-draft-tokens is for drafts: give --draft"),
        (["--draft", "lokup"], "(a draft may also be lookup or cut:2)"),
    ],
)
def test_generate_settings(run: Run, teacher: Path, options: list[str], said: str) -> None:
    assert_refused(run("generate", teacher, "hi", *options), said)


def test_a_draft_of_another_vocabulary(run: Run, teacher: Path, other_teacher: Path, tmp_path: Path) -> None:
    for command in (["generate", teacher, "hi"], ["chat", teacher, "--max-new-tokens", 8]):
        result = run(*command, "--draft", other_teacher)
        assert_refused(result, "the draft has a vocabulary of 289 tokens and the target one of 299")
    swapped = tmp_path / "swapped"
    shutil.copytree(teacher, swapped)
    tokenizer = swapped / "tokenizer.json"
    tokenizer.write_text(
        tokenizer.read_text(encoding="utf-8").replace('"<|endoftext|>"', '"<|fim|>"'), encoding="utf-8"
    )
    result = run("generate", teacher, "hi", "--draft", swapped)
    assert_refused(result, "the target and the draft do not share a tokenizer")


def test_chat_without_a_draft(run: Run, teacher: Path) -> None:
    assert_refused(run("chat", teacher, "--num-draft-tokens", "auto"), "--num-draft-tokens is for drafts")


def test_an_empty_prompt(run: Run, teacher: Path) -> None:
    assert_refused(run("generate", teacher, "", "--no-chat"), "the prompt is empty")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "lots"], "'lots' is no number of tokens"),
        (["--tokens", "0"], "num_tokens must be at least 1"),
        (["--tokens", "1k", "--kind", "caht"], "did you mean 'chat'"),
        (["--tokens", "1k", "--temperature", "0"], "temperature must be above 0"),
    ],
)
def test_synthesize_settings(run: Run, teacher: Path, out: Path, options: list[str], said: str) -> None:
    assert_refused(run("synthesize", teacher, "--out", out, *options), said)
    assert not out.parent.exists()


def test_unknown_benchmark(run: Run) -> None:
    assert_refused(run("bench", "opps"), "no benchmark 'opps': did you mean 'ops'?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conver", "x"], "No such command 'conver'"),
        (["info", "x", "--jsn"], "No such option: --jsn"),
        (["info"], "Missing argument"),
        (["convert", "x", "--attention", "half"], "'--attention'"),
        (["synthesize", "x", "--out", "d"], "Missing option '--tokens'"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], said: str) -> None:
    assert_refused(run(*arguments), said)


class TestTheProcess:
    """The same, as a user sees it."""

    def test_refused(self, run_process: Run, teacher: Path, out: Path) -> None:
        result = run_process("convert", teacher, "--attention", "1.5", "--out", out)
        assert_refused(result, "attention 1.5 is out of range")
        assert not out.parent.exists()

    def test_wrong_usage(self, run_process: Run) -> None:
        assert_refused(run_process("conver"), "No such command")

    def test_done_and_machine_readable(self, run_process: Run, teacher: Path) -> None:
        result = run_process("convert", teacher, "--dry-run", "--json")
        assert (result.status, result.err) == (0, "")
        assert json.loads(result.out)["mixer"] == "mamba2"


class TestOtherErrors:
    def run_with(self, error: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch) -> Result:
        def raising(**_: Any) -> None:
            raise error

        monkeypatch.setattr(main_module, "app", raising)
        return run("info", "x")

    def test_one_line_whatever_the_message(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert_refused(self.run_with(MambifyError("two\nlines"), run, monkeypatch), "two lines", status=1)
        assert_refused(self.run_with(OutputWriteError("disk"), run, monkeypatch), "disk", status=1)

    def test_interrupted(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert_refused(self.run_with(KeyboardInterrupt(), run, monkeypatch), "interrupted", status=130)

    def test_interrupted_in_a_command(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("mambify.families.sources.resolve", interrupt)
        assert_refused(run("info", "x"), "interrupted", status=130)

    def test_a_mistake_of_ours_keeps_its_traceback(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ZeroDivisionError):
            self.run_with(ZeroDivisionError(), run, monkeypatch)
