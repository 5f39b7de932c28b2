"""Tasks through lm-eval: found by name, run on one model, and given back question by question."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mambify.errors import InvalidOptionError, MissingDependencyError, UnknownSourceError, UsageError, did_you_mean
from mambify.evaluate.tasks.lm import TaskModel
from mambify.evaluate.tasks.local import LOCAL_TASKS, LocalQuestions, read_local

Scores = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class TaskSet:
    """Tasks ready to run.

    Attributes:
        loaded: What lm-eval's ``TaskManager.load`` returns.
        members: Name asked for → the tasks it stands for: itself, or those of a group, whose questions are pooled.
        local: Task → the file its questions come from; empty for tasks of the Hub.
    """

    loaded: Mapping[str, Any]
    members: Mapping[str, Sequence[str]]
    local: Mapping[str, LocalQuestions] = field(default_factory=dict)

    def facts(self, name: str) -> dict[str, Any]:
        """What there is to know of a row beside its figures: version, examples in the prompt, origin of the data."""
        tasks = [self.loaded["tasks"][member] for member in self.members[name]]
        facts: dict[str, Any] = {"version": tasks[0].VERSION, "num_fewshot": tasks[0].config.num_fewshot or 0}
        if len(tasks) > 1:
            facts["pooled"] = list(self.members[name])
        elif name in self.local:
            facts |= {"file": str(self.local[name].file), "sha256": self.local[name].sha256}
        else:
            facts["dataset"] = "/".join(filter(None, [tasks[0].config.dataset_path, tasks[0].config.dataset_name]))
        return facts


def lm_eval_version() -> str:
    """The version of lm-eval.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("tasks need lm-eval: pip install 'mambify[eval]'")
    return importlib.metadata.version("lm_eval")


def load_tasks(
    names: Sequence[str], *, data_dir: str | Path | None = None, num_fewshot: int | None = None, seed: int = 0
) -> TaskSet:
    """Finds tasks by lm-eval's names and reads their questions.

    Args:
        names: Tasks, groups or tags of lm-eval.
        data_dir: Read the questions from files of this directory (see :mod:`mambify.evaluate.tasks.local`) and nothing
            from a network; ``None`` fetches them from the Hub.
        num_fewshot: Worked examples in each prompt; the task's own number where ``None``. Files have questions only.
        seed: Of the choice of examples.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UsageError: a name that is unknown or given twice, or questions that cannot be had.
    """
    lm_eval_version()
    if not names:
        raise InvalidOptionError("no task named: for instance arc_easy,piqa")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InvalidOptionError(f"task '{repeated[0]}' is named twice")
    if num_fewshot is not None and num_fewshot < 0:
        raise InvalidOptionError(f"num_fewshot must be at least 0, not {num_fewshot}")
    if data_dir is not None and num_fewshot:
        raise InvalidOptionError("files hold questions only, no worked examples: leave num_fewshot out with data_dir")
    local = {} if data_dir is None else {name: read_local(name, data_dir) for name in names}
    with _quiet():
        manager = _task_manager()
        for name in names:
            if name not in manager.all_tasks:
                # lm-eval knows thousands; where none is near, those that files can give are named instead
                near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
                raise InvalidOptionError(f"lm-eval knows no task '{name}': {did_you_mean(name, near or LOCAL_TASKS)}")
        loaded = _load(manager, names, local)
    members = {}
    for name in names:
        if name in loaded["groups"]:
            members[name] = [task.task_name for task in loaded["groups"][name].get_all_tasks()]
        elif name in loaded["tasks"]:
            members[name] = [name]
        else:
            members |= {task: [task] for task in manager.load([name])["tasks"]}  # a tag: each of its tasks
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"task '{task.task_name}' runs the code that a model writes, which mambify does not do")
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot if num_fewshot is not None else own or 0)
        task.set_fewshot_seed(seed=seed)
    return TaskSet(loaded, members, local)


def run_tasks(
    model: TaskModel, tasks: TaskSet, *, limit: int | None = None, chat_template: bool = False, seed: int = 0
) -> dict[str, Scores]:
    """Runs every task on one model.

    Args:
        model: The model.
        tasks: From :func:`load_tasks`; may be run on one model after another.
        limit: Only so many questions of each task, from its beginning.
        chat_template: Put each prompt into the model's chat template.
        seed: Of what a task draws at random.

    Returns:
        Row name → metric → the value of each question, ``[N]``. A metric behind one of several filters of a task is
        called ``metric,filter``. Metrics that are no mean over questions (perplexities, F1) are not among them.

    Raises:
        InvalidOptionError: a limit below 1.
        UsageError: a task without a metric that is a mean over questions.
    """
    if limit is not None and limit < 1:
        raise InvalidOptionError(f"limit must be at least 1, not {limit}")
    from lm_eval import evaluator

    torch.manual_seed(seed)
    with _quiet():
        result = evaluator.evaluate(
            lm=model,
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=0,  # intervals are ours: paired, over questions
            log_samples=True,
            apply_chat_template=chat_template,
        )
    by_task = {
        name: _by_metric(samples, tasks.loaded["tasks"][name].aggregation())
        for name, samples in result["samples"].items()
    }
    rows = {name: _pooled([by_task[member] for member in members]) for name, members in tasks.members.items()}
    for name, scores in rows.items():
        if not scores:
            raise UsageError(f"task '{name}' has no metric that is a mean over questions: run it with lm-eval itself")
    return rows


def _by_metric(samples: Sequence[Mapping[str, Any]], aggregation: Mapping[str, Callable[..., float]]) -> Scores:
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"])):
        for metric in sample["metrics"]:
            if getattr(aggregation.get(metric), "__name__", "mean") == "mean":
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(name, []).append(float(sample[metric]))
    return {name: np.array(column) for name, column in values.items()}


def _pooled(parts: Sequence[Scores]) -> Scores:
    """The questions of all tasks of a group together, in the metrics that all of them have."""
    shared = [metric for metric in parts[0] if all(metric in part for part in parts)]
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in shared}


@cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, names: Sequence[str], local: Mapping[str, LocalQuestions]) -> dict[str, Any]:
    specifications: list[Any] = list(names)
    if local:
        # A group, because its members take over what they do not replace from the task of the same name.
        members = [{"task": name} | _replacements(questions) for name, questions in local.items()]
        specifications = [{"group": "files", "task": members}]
    try:
        loaded: dict[str, Any] = manager.load(specifications)
    except Exception as error:  # a task is code of someone else's, and its data are behind a network
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        instead = "" if local else f"; with --data-dir, {', '.join(LOCAL_TASKS)} are read from files"
        raise UnknownSourceError(f"cannot load {', '.join(names)}: {reason}{instead}") from error
    return {"tasks": loaded["tasks"], "groups": {}, "group_map": {}} if local else loaded


def _replacements(questions: LocalQuestions) -> dict[str, Any]:
    """What of a task's configuration is replaced: where its questions come from."""

    def rows(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(questions.rows)}

    return {
        "custom_dataset": rows,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
        "num_fewshot": 0,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs each of its steps and defaults; what it cannot do it raises."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
