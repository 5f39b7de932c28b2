"""lm-eval's tasks on files of a directory, without a network: which files, and how their rows become the Hub's.

Only the data are replaced. Rows get the columns of the Hub data set that lm-eval's task of that name reads, and the
task itself (prompt, choices, metrics) stays lm-eval's own: the prompts are the same to the character.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambify.errors import InvalidOptionError, UnknownSourceError, UsageError, did_you_mean
from mambify.io import read_text

Row = dict[str, Any]
_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class LocalTask:
    """Where a task's questions are, relative to the data directory, and how a row becomes the Hub's.

    ``labels`` is a file with a number a line, the answer to the question on the same line of ``file``.
    """

    file: str
    as_hub: Callable[[Row], Row]
    labels: str | None = None


def _arc(row: Row) -> Row:
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"id": row["id"], "question": question} | _lettered(row)


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["query"]} | _lettered(row)


def _lettered(row: Row) -> Row:
    letters = list(_LETTERS[: len(row["choices"])])
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["gold"]]}


def _copa(row: Row) -> Row:
    # "The man turned on the faucet, therefore": lm-eval writes premise and connector itself, without the comma.
    premise, _, connector = row["query"].rpartition(", ")
    return {
        "premise": f"{premise}.",
        "question": {"because": "cause", "therefore": "effect"}[connector],
        "choice1": row["choices"][0],
        "choice2": row["choices"][1],
        "label": row["gold"],
    }


def _columns(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


#: lm-eval's name of a task → its files
LOCAL_TASKS: Mapping[str, LocalTask] = {
    "arc_challenge": LocalTask("eval_mc/arc_challenge_test.jsonl", _arc),
    "arc_easy": LocalTask("eval_mc/arc_easy_test.jsonl", _arc),
    "commonsense_qa": LocalTask("eval_mc/commonsense_qa_val.jsonl", _columns("id", "question", "choices", "answerKey")),
    "copa": LocalTask("eval_mc/copa_val.jsonl", _copa),
    "gsm8k": LocalTask("eval_chat/gsm8k_test.jsonl", _columns("question", "answer")),
    "openbookqa": LocalTask("eval_mc/openbookqa_test.jsonl", _openbookqa),
    "piqa": LocalTask(
        "eval_mc/piqa_valid.jsonl", _columns("goal", "sol1", "sol2", "label"), "eval_mc/piqa_valid-labels.lst"
    ),
}


@dataclass(frozen=True)
class LocalQuestions:
    """The rows of a task, and where they came from."""

    rows: list[Row]
    file: Path
    sha256: str


def read_local(name: str, directory: str | Path) -> LocalQuestions:
    """The questions of lm-eval's task ``name``, as the Hub has them, out of a directory.

    A file is looked for at its place in the directory (``eval_mc/arc_easy_test.jsonl``), then in the directory itself.

    Raises:
        InvalidOptionError: no task that can be read from files.
        UnknownSourceError: no such directory or file.
        UsageError: a file that is not what it should be.
    """
    directory = Path(directory)
    if name not in LOCAL_TASKS:
        raise InvalidOptionError(f"task '{name}' cannot be read from files: {did_you_mean(name, LOCAL_TASKS)}")
    if not directory.is_dir():
        raise UnknownSourceError(f"no data directory {directory}")
    task = LOCAL_TASKS[name]
    file = _find(directory, task.file, name)
    rows = _read_rows(file)
    if task.labels is not None:
        labels_file = _find(directory, task.labels, name)
        labels = read_text(labels_file).split()
        if len(labels) != len(rows):
            raise UsageError(f"{labels_file} has {len(labels)} labels for the {len(rows)} rows of {file.name}")
        rows = [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(task.as_hub(row))
        except (AttributeError, LookupError, TypeError) as error:
            raise UsageError(f"{file}, line {number}, is no question of {name}: {error!r}") from error
    return LocalQuestions(questions, file, hashlib.sha256(file.read_bytes()).hexdigest())


def _find(directory: Path, place: str, name: str) -> Path:
    for path in (directory / place, directory / Path(place).name):
        if path.is_file():
            return path
    there = {path.name for path in directory.rglob("*") if path.is_file()}
    nearest = did_you_mean(Path(place).name, there) if there else "it holds no file"
    raise UnknownSourceError(f"task '{name}' needs {directory / place}, which is not there: {nearest}")


def _read_rows(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{file}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{file}, line {number}, is not a JSON object")
        rows.append(row)
    if not rows:
        raise UsageError(f"{file} holds no question")
    return rows
