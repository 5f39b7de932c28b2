"""Teacher and student side by side on tasks: accuracies, their differences, and means over tasks, with intervals.

Both models answer the same questions, and a resample draws questions, not answers: the intervals of differences are
paired, and much narrower than those of the accuracies. Tasks are resampled independently of each other.

Letters: N questions, M models, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mambify.errors import InvalidOptionError
from mambify.evaluate.bootstrap import Array, resampled_totals, written
from mambify.evaluate.tasks.lm import TaskModel
from mambify.evaluate.tasks.run import Scores, TaskSet, lm_eval_version, load_tasks, run_tasks
from mambify.machine import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelProgress = Callable[[str, str, int, int], None]

#: what the log likelihoods of a question's choices are divided by before the largest is taken
NORMALISATION = {
    "acc": "none: the sum over the choice's tokens of their log probabilities in nats, given the question",
    "acc_norm": "the same sum divided by the choice's length in characters, without the space before it",
    "acc_bytes": "the same sum divided by the choice's length in UTF-8 bytes, without the space before it",
}
#: name of a mean over tasks → the metrics that enter it: of each task the first that it has
MEANS = {"acc": ("acc",), "acc_norm": ("acc_norm",), "acc_norm, else acc": ("acc_norm", "acc")}


def compare_on_tasks(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tasks: TaskSet | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: ModelProgress | None = None,
) -> dict[str, Any]:
    """Runs tasks on one model, or on two that answer the same questions.

    Args:
        student: The model in question.
        teacher: What it is measured against; None runs the student alone.
        tasks: Names of lm-eval's, or a :class:`~mambify.evaluate.tasks.run.TaskSet` that is loaded already.
        tokenizer: The student's.
        teacher_tokenizer: The teacher's; the student's where None.
        data_dir: Directory to read the questions from instead of the Hub.
        num_fewshot: Worked examples in each prompt; each task's own number where None.
        chat_template: Put the prompts into the models' chat templates.
        limit: Only so many questions of each task, from its beginning.
        batch_size: Continuations or prompts in a forward pass; None goes by their length and the device.
        resamples: R, of the bootstrap.
        seed: Of the bootstrap, of worked examples, and of what a task draws.
        progress: Called with ("teacher" or "student", what, done, all).

    Returns:
        ``{"tasks": {name: {"num_questions", "version", "num_fewshot", …, "metrics": {metric: figures}}},
        "means": {metric: {"tasks", **figures}}, "normalisation", "limit", "chat_template", "resamples", "seed",
        "environment"}``, where figures are ``student``, ``teacher`` and ``difference`` (student minus teacher) as
        shares of 1, each with its 95% interval ``<figure>_interval: [low, high]``, which a single question has not.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UsageError: see :func:`~mambify.evaluate.tasks.run.load_tasks` and ``run_tasks``.
    """
    if resamples < 1:
        raise InvalidOptionError(f"resamples must be at least 1, not {resamples}")
    if not isinstance(tasks, TaskSet):
        tasks = load_tasks(tasks, data_dir=data_dir, num_fewshot=num_fewshot, seed=seed)
    models = {"student": (student, tokenizer)}
    if teacher is not None:
        models = {"teacher": (teacher, teacher_tokenizer or tokenizer), **models}
    scores: dict[str, dict[str, Scores]] = {}
    for role, (model, its_tokenizer) in models.items():
        report = None if progress is None else _named(progress, role)
        runner = TaskModel(model, its_tokenizer, batch_size=batch_size, progress=report)
        scores[role] = run_tasks(runner, tasks, limit=limit, chat_template=chat_template, seed=seed)
    results, means = _figures(scores, resamples, seed)
    for name, result in results.items():
        results[name] = {"num_questions": result.pop("num_questions"), **tasks.facts(name), **result}
    return {
        "tasks": results,
        "means": means,
        "normalisation": NORMALISATION,
        "limit": limit,
        "chat_template": chat_template,
        "resamples": resamples,
        "seed": seed,
        "environment": environment(str(student.device)) | {"lm_eval": lm_eval_version(), "dtype": str(student.dtype)},
    }


def _figures(
    scores: Mapping[str, Mapping[str, Scores]], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Figures of every task and metric, and of the means over tasks; ``scores`` by role, task and metric."""
    roles = list(scores)
    values: dict[tuple[str, str], Array] = {}  # [M]
    resampled: dict[tuple[str, str], Array] = {}  # [R, M]
    results: dict[str, dict[str, Any]] = {}
    for index, (task, of_task) in enumerate(scores["student"].items()):
        metrics = {}
        for metric in of_task:
            values_NM = np.stack([scores[role][task][metric] for role in roles], axis=1)
            values[task, metric] = values_NM.mean(0)
            # One seed a task: the metrics of a task meet the same resamples, different tasks different ones.
            resampled[task, metric] = resampled_totals(values_NM, resamples, [seed, index]) / len(values_NM)
            counted = resampled[task, metric] if len(values_NM) > 1 else None
            metrics[metric] = _with_intervals(roles, values[task, metric], counted)
        results[task] = {"num_questions": max(map(len, of_task.values())), "metrics": metrics}
    means: dict[str, dict[str, Any]] = {}
    for name, wanted in MEANS.items():
        chosen = [(task, metric) for task in results for metric in [_first(wanted, results[task]["metrics"])] if metric]
        known = [mean["tasks"] for mean in means.values()]
        if len(chosen) > 1 and dict(chosen) not in known:
            mean_M = np.mean([values[key] for key in chosen], axis=0)
            several = all("student_interval" in results[task]["metrics"][metric] for task, metric in chosen)
            resampled_RM = np.mean([resampled[key] for key in chosen], axis=0) if several else None
            means[name] = {"tasks": dict(chosen), **_with_intervals(roles, mean_M, resampled_RM)}
    return results, means


def _first(wanted: Sequence[str], known: Mapping[str, Any]) -> str | None:
    return next((metric for metric in wanted if metric in known), None)


def _with_intervals(roles: Sequence[str], value_M: Array, resampled_RM: Array | None) -> dict[str, Any]:
    columns = {role: np.eye(len(roles))[index] for index, role in enumerate(roles)}
    if "teacher" in columns:
        columns["difference"] = columns["student"] - columns["teacher"]
    figures: dict[str, Any] = {}
    for name, weights_M in columns.items():
        figures[name] = float(value_M @ weights_M)
        if resampled_RM is not None:
            figures[f"{name}_interval"] = np.quantile(resampled_RM @ weights_M, [0.025, 0.975]).tolist()
    return figures


def task_table(result: Mapping[str, Any], *, title: str | None = None) -> Table:
    """A table of what :func:`compare_on_tasks` returned, a metric a row, in percent."""
    caption = (
        "percent of the questions, in brackets the 95% bootstrap interval over questions, paired for the difference. "
        "acc takes the choice of the largest log likelihood; acc_norm divides it by the choice's length in characters."
    )
    table = Table(title=title, caption=caption)
    rows = [
        (name, f"{task['num_questions']:,}", metric, figures)
        for name, task in result["tasks"].items()
        for metric, figures in task["metrics"].items()
    ]
    rows += [(f"mean of {len(mean['tasks'])}", "", metric, mean) for metric, mean in result["means"].items()]
    compared = any("teacher" in figures for *_, figures in rows)
    table.add_column("task")
    table.add_column("questions", justify="right")
    table.add_column("metric")
    for heading in ("teacher", "student", "difference") if compared else ("model",):
        table.add_column(heading, justify="right")
    first_mean = len(rows) - len(result["means"])
    for index, (name, questions, metric, figures) in enumerate(rows):
        columns = ("teacher", "student", "difference") if compared else ("student",)
        cells = [_cell(figures, column) for column in columns]
        table.add_row(name, questions, metric, *cells, end_section=index == first_mean - 1)
    return table


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if name == "difference":
        return written(figures, name, "+.1f", " to ", scale=100)
    return written(figures, name, ".1f", scale=100)


def _named(progress: ModelProgress, role: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: progress(role, what, done, total)
