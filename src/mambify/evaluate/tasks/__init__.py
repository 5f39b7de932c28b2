"""Zero-shot tasks through lm-eval: teacher and student side by side, from the Hub or from local files."""

from __future__ import annotations

from mambify.evaluate.tasks.compare import compare_on_tasks, task_table
from mambify.evaluate.tasks.lm import TaskModel
from mambify.evaluate.tasks.local import LOCAL_TASKS
from mambify.evaluate.tasks.run import TaskSet, load_tasks, run_tasks

__all__ = ["LOCAL_TASKS", "TaskModel", "TaskSet", "compare_on_tasks", "load_tasks", "run_tasks", "task_table"]
