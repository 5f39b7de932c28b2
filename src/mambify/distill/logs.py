"""Where a run's figures go beside the console: one JSON line a log event, and whoever listens for progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mambify.io import append_jsonl, atomic_write_text


@dataclass(frozen=True)
class Progress:
    """One step of a stage, as told to a listener (a progress bar, say).

    Attributes:
        stage: directory name of the stage, ``01-align``.
        step, num_steps: optimizer steps.
        figures: what was last logged: loss, learning rate, metrics.
    """

    stage: str
    step: int
    num_steps: int
    figures: dict[str, float]


Listener = Callable[[Progress], None]


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Appends every log event of one stage to ``metrics.jsonl`` and tells the listener of every step."""

    def __init__(self, path: Path, stage: str, tokens_per_step: int, listener: Listener | None) -> None:
        self.path, self.stage, self.tokens_per_step, self.listener = path, stage, tokens_per_step, listener
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_after(self.path, self.stage, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.listener is not None:
            self.listener(Progress(self.stage, state.global_step, state.max_steps, self.figures))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self.figures = {name: value for name, value in logs.items() if name != "epoch"}
        row = {"stage": self.stage, "step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        append_jsonl(self.path, row | self.figures)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a crash cut short is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def forget_after(path: Path, stage: str, step: int) -> None:
    """Drops the rows of ``stage`` past ``step``: a resumed run writes them again."""
    if path.is_file():
        rows = [row for row in read_metrics(path) if row["stage"] != stage or row["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
