"""Tasks through lm-eval: what its own ``hf`` model gives, on its own prompts, paired with the teacher."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mambify.errors import InvalidOptionError, MissingDependencyError, UnknownSourceError, UnsupportedError, UsageError
from mambify.evaluate.tasks import LOCAL_TASKS, TaskModel, compare_on_tasks, load_tasks, run_tasks, task_table
from mambify.evaluate.tasks.compare import NORMALISATION
from mambify.evaluate.tasks.local import read_local
from tiny import byte_tokenizer, llama

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'mambify[eval]'")

TOKENIZER = byte_tokenizer()
FOUR = ["arc_easy", "piqa", "openbookqa", "commonsense_qa"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """lm-eval's own model class warns through its logger."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given) for given in arguments]


PAIRS = requests(
    ("Question: Why?\nAnswer:", " because it is"),
    ("Question: Why?\nAnswer:", " no"),
    ("Question: Why?\nAnswer:", " perhaps so, my friend"),
    ("The cat sat on the", " mat."),
    ("The cat sat on the  ", "mat"),  # spaces at the end go to the continuation
    ("", " hello there"),
    ("", "<|im_start|>x"),  # begins with the token that stands before an empty context
    ("<|im_start|>user\nhi", " there"),
    ("word " * 90, " and the end"),  # longer than the model reads
)
TEXT = "The quick brown fox jumps over the lazy dog. How are you today?"


def models(tokenizer: Any, model: Any, **options: Any) -> tuple[TaskModel, Any]:
    """Ours and lm-eval's."""
    from lm_eval.models.huggingface import HFLM

    return TaskModel(model, tokenizer, **options), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)


def assert_same_likelihoods(ours: TaskModel, theirs: Any) -> None:
    got, wanted = ours.loglikelihood(PAIRS), theirs.loglikelihood(PAIRS, disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    texts = requests((TEXT,), (TEXT * 5,), ("a",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


@pytest.mark.parametrize("max_length", [256, 24])
def test_likelihoods_are_those_of_lm_evals_own_model(max_length: int) -> None:
    assert_same_likelihoods(*models(TOKENIZER, llama(len(TOKENIZER)), max_length=max_length))


def test_answers_are_those_of_lm_evals_own_model() -> None:
    ours, theirs = models(TOKENIZER, llama(len(TOKENIZER)))
    asked = requests(
        ("How are you?", {"until": ["e", "Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
        ("The quick brown", {"until": "o", "max_gen_toks": 12, "top_p": 0.9}),
        ("I", {"until": ["e", "Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_chat_template() -> None:
    ours, theirs = models(TOKENIZER, llama(len(TOKENIZER)))
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert ours.chat_template(True) == theirs.chat_template(True)
    without = TaskModel(llama(len(TOKENIZER)), byte_tokenizer(template=None))
    with pytest.raises(UnsupportedError, match="no chat template"):
        without.apply_chat_template(messages)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of eight made-up questions a task, in the files' own formats."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "eval_mc").mkdir()
    (folder / "eval_chat").mkdir()
    choices = ["red", "green and blue", "yellow", "blue"]
    arc = [
        {
            "id": f"q{n}",
            "query": f"Question: What colour is {n}?\nAnswer:",
            "choices": choices[: 3 + n % 2],
            "gold": n % 3,
        }
        for n in range(8)
    ]
    csqa = {"label": list("ABCDE"), "text": [*choices, "none"]}
    rows: dict[str, list[dict[str, Any]]] = {
        "eval_mc/arc_easy_test.jsonl": arc,
        "eval_mc/arc_challenge_test.jsonl": arc[:4],
        "eval_mc/openbookqa_test.jsonl": [{"query": f"{n} is", "choices": choices, "gold": n % 4} for n in range(8)],
        "eval_mc/commonsense_qa_val.jsonl": [
            {"id": str(n), "question": f"What is {n}?", "choices": csqa, "answerKey": "ABCDE"[n % 5]} for n in range(8)
        ],
        "eval_mc/piqa_valid.jsonl": [
            {"goal": f"Paint {n}", "sol1": "use a brush", "sol2": "use tea"} for n in range(8)
        ],
        "eval_mc/copa_val.jsonl": [
            {"query": "The man ran, therefore", "choices": ["he was tired.", "he slept."], "gold": 0},
            {"query": "The man, who ran, was tired, because", "choices": ["it was far.", "it rained."], "gold": 1},
        ],
        "eval_chat/gsm8k_test.jsonl": [{"question": f"{n} and 1?", "answer": f"Add.\n#### {n + 1}"} for n in range(3)],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "eval_mc/piqa_valid-labels.lst").write_text("0\n1\n" * 4)
    return folder


#: the prompt of each task's first question above, and what is scored after it: as lm-eval writes them
PROMPTS = {
    "arc_easy": ("Question: What colour is 0?\nAnswer:", [" red", " green and blue", " yellow"]),
    "arc_challenge": ("Question: What colour is 0?\nAnswer:", [" red", " green and blue", " yellow"]),
    "openbookqa": ("0 is", [" red", " green and blue", " yellow", " blue"]),
    "commonsense_qa": (
        "Question: What is 0?\nA. red\nB. green and blue\nC. yellow\nD. blue\nE. none\nAnswer:",
        [" A", " B", " C", " D", " E"],
    ),
    "piqa": ("Question: Paint 0\nAnswer:", [" use a brush", " use tea"]),
    "copa": ("The man ran therefore", ["  he was tired.", "  he slept."]),
    "gsm8k": ("Question: 0 and 1?\nAnswer:", None),
}


def test_prompts_and_metrics_are_lm_evals_own(data: Path) -> None:
    assert set(PROMPTS) == set(LOCAL_TASKS)
    tasks = load_tasks(list(PROMPTS), data_dir=data).loaded["tasks"]
    for name, (prompt, choices) in PROMPTS.items():
        tasks[name].build_all_requests(limit=1)
        arguments = [instance.args for instance in tasks[name].instances]
        assert {context for context, _ in arguments} == {prompt}
        if choices is None:
            assert arguments[0][1]["until"] == ["Question:", "</s>", "<|im_end|>"]
        else:
            assert [choice for _, choice in arguments] == choices
    wanted = {"arc_easy": ["acc", "acc_norm"], "piqa": ["acc", "acc_norm"], "commonsense_qa": ["acc"], "copa": ["acc"]}
    assert {name: list(tasks[name].aggregation()) for name in wanted} == wanted
    assert [tasks["piqa"].doc_to_target(doc) for doc in tasks["piqa"].eval_docs] == [0, 1] * 4
    assert [tasks["arc_easy"].doc_to_target(doc) for doc in tasks["arc_easy"].eval_docs] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert tasks["copa"].doc_to_text(tasks["copa"].eval_docs[1]) == "The man, who ran, was tired because"


def test_files_may_stand_in_the_directory_itself(data: Path) -> None:
    questions = read_local("copa", data / "eval_mc")
    assert questions.rows == read_local("copa", data).rows
    assert len(questions.sha256) == 64


def test_two_models_on_the_same_questions(data: Path) -> None:
    # room for gsm8k's answers of at most 256 tokens
    student, teacher = (llama(len(TOKENIZER), seed=seed, max_position_embeddings=512) for seed in (1, 0))
    told: list[tuple[Any, ...]] = []
    result = compare_on_tasks(
        student,
        teacher,
        [*FOUR, "gsm8k"],
        tokenizer=TOKENIZER,
        data_dir=data,
        limit=6,
        progress=lambda *given: told.append(given),
    )
    alone = run_tasks(TaskModel(student, TOKENIZER), load_tasks(FOUR, data_dir=data), limit=6)
    beside = run_tasks(TaskModel(teacher, TOKENIZER), load_tasks(FOUR, data_dir=data), limit=6)
    for name in FOUR:
        task = result["tasks"][name]
        assert task["num_questions"] == 6
        assert task["num_fewshot"] == 0
        assert task["file"] == str(data / LOCAL_TASKS[name].file)
        for metric, figures in task["metrics"].items():
            assert metric in NORMALISATION
            assert figures["student"] == alone[name][metric].mean()
            assert figures["teacher"] == beside[name][metric].mean()
            assert figures["difference"] == pytest.approx((alone[name][metric] - beside[name][metric]).mean())
            for part in ("student", "teacher", "difference"):
                low, high = figures[f"{part}_interval"]
                assert low <= figures[part] <= high
    mean = result["means"]["acc"]
    assert mean["tasks"] == dict.fromkeys(FOUR, "acc")
    assert mean["difference"] == pytest.approx(
        np.mean([result["tasks"][name]["metrics"]["acc"]["difference"] for name in FOUR])
    )
    assert result["means"]["acc_norm"]["tasks"] == dict.fromkeys(FOUR[:3], "acc_norm")
    assert result["means"]["acc_norm, else acc"]["tasks"] == dict.fromkeys(FOUR[:3], "acc_norm") | {FOUR[3]: "acc"}
    assert set(result["tasks"]["gsm8k"]["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert result["tasks"]["gsm8k"]["num_questions"] == 3
    assert result["environment"]["lm_eval"]
    assert {(role, what) for role, what, *_ in told} == {
        (role, what) for role in ("teacher", "student") for what in ("choices", "answers")
    }
    assert task_table(result).row_count == 7 + 2 + 3
    assert json.loads(json.dumps(result)) == result


def test_a_model_beside_itself_differs_nowhere(data: Path) -> None:
    model = llama(len(TOKENIZER))
    result = compare_on_tasks(model, model, FOUR[:2], tokenizer=TOKENIZER, data_dir=data)
    for figures in [result["means"]["acc"], result["tasks"]["piqa"]["metrics"]["acc_norm"]]:
        assert (figures["difference"], figures["difference_interval"]) == (0.0, [0.0, 0.0])
    again = compare_on_tasks(model, model, FOUR[:2], tokenizer=TOKENIZER, data_dir=data)
    assert again["tasks"] == result["tasks"]


def test_alone_and_in_the_chat_template(data: Path) -> None:
    model = llama(len(TOKENIZER))
    result = compare_on_tasks(model, None, ["piqa"], tokenizer=TOKENIZER, data_dir=data, chat_template=True)
    assert result["chat_template"] is True
    assert "teacher" not in result["tasks"]["piqa"]["metrics"]["acc"]
    assert result["means"] == {}
    assert [column.header for column in task_table(result).columns] == ["task", "questions", "metric", "model"]


def test_groups_are_pooled_and_yaml_tasks_stand_for_themselves(data: Path) -> None:
    tasks = load_tasks(["arc_easy", "arc_challenge"], data_dir=data)
    pooled = type(tasks)(tasks.loaded, {"arc": ["arc_easy", "arc_challenge"]}, {})
    scores = run_tasks(TaskModel(llama(len(TOKENIZER)), TOKENIZER), pooled)
    assert len(scores["arc"]["acc"]) == 8 + 4
    assert pooled.facts("arc")["pooled"] == ["arc_easy", "arc_challenge"]


class TestRefusals:
    def test_unknown_tasks(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidOptionError, match="no task 'arc_esy': did you mean 'arc_easy'"):
            load_tasks(["arc_esy"])
        with pytest.raises(InvalidOptionError, match="'piqaa' cannot be read from files: did you mean 'piqa'"):
            load_tasks(["piqaa"], data_dir=data)
        with pytest.raises(InvalidOptionError, match="'piqa' is named twice"):
            load_tasks(["piqa", "piqa"], data_dir=data)
        with pytest.raises(UnknownSourceError, match="no data directory"):
            load_tasks(["piqa"], data_dir=tmp_path / "none")

    def test_missing_files(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(UnknownSourceError, match=r"piqa_valid\.jsonl, which is not there: it holds no file"):
            load_tasks(["piqa"], data_dir=tmp_path)
        (tmp_path / "piqa_valid.json").write_text("{}")
        with pytest.raises(UnknownSourceError, match=r"did you mean 'piqa_valid\.json'"):
            load_tasks(["piqa"], data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "line 1, is not JSON"),
            ("[1]", "not a JSON object"),
            ('{"a": 1}', "no question of copa"),
            ("", "no question"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, content: str, said: str) -> None:
        (tmp_path / "copa_val.jsonl").write_text(content)
        with pytest.raises(UsageError, match=said):
            load_tasks(["copa"], data_dir=tmp_path)

    def test_labels_that_do_not_fit(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "piqa_valid.jsonl").write_bytes((data / "eval_mc/piqa_valid.jsonl").read_bytes())
        (tmp_path / "piqa_valid-labels.lst").write_text("0\n1\n")
        with pytest.raises(UsageError, match="2 labels for the 8 rows"):
            load_tasks(["piqa"], data_dir=tmp_path)

    def test_examples_out_of_files(self, data: Path) -> None:
        with pytest.raises(InvalidOptionError, match="no worked examples"):
            load_tasks(["gsm8k"], data_dir=data, num_fewshot=5)

    def test_limit(self, data: Path) -> None:
        with pytest.raises(InvalidOptionError, match="limit must be at least 1"):
            compare_on_tasks(llama(len(TOKENIZER)), None, ["piqa"], tokenizer=TOKENIZER, data_dir=data, limit=0)

    def test_without_lm_eval(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'mambify\[eval\]'"):
            load_tasks(["piqa"], data_dir=data)


def test_the_real_teacher(smollm2: LoadedModel, shared_data: Path) -> None:
    ours, theirs = models(smollm2.tokenizer, smollm2.model)
    got, wanted = ours.loglikelihood(PAIRS[:4]), theirs.loglikelihood(PAIRS[:4], disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    result = compare_on_tasks(smollm2.model, None, FOUR, tokenizer=smollm2.tokenizer, data_dir=shared_data, limit=3)
    assert torch.is_grad_enabled()
    # Whether each of the first questions is answered rightly: 135 M parameters know some of them.
    assert 0.2 < result["means"]["acc_norm, else acc"]["student"] < 0.9
    assert {task["num_questions"] for task in result["tasks"].values()} == {3}
