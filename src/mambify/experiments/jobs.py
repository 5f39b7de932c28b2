"""One run of an experiment: a recipe, trained once, and its student's scores.

OUT/runs/NAME-HASH/
  job.json        what it is
  run/            the distillation run, student included
  scores-*.json   one for each way of scoring
  log.txt         what a run in a process of its own said
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambify.distill.logs import Progress
from mambify.distill.recipe import Recipe, parse_recipe
from mambify.distill.run import summaries
from mambify.experiments.evaluation import Evaluation, Examination
from mambify.families.load import LoadedModel, load
from mambify.io import read_json, write_json
from mambify.machine import environment
from mambify.workflows.distill import distill
from mambify.workflows.texts import Known

Say = Callable[[str], None]
#: takes an experiment's result as far as it goes
Report = Callable[[dict[str, Any]], None]

_TELL_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        label: what people call it.
        recipe: as plain data; where it is kept is decided by all the rest.
        after: the run whose student this one begins from.
        silenced: its student is also scored with its new mixers giving nothing.
        made: the student, where there is one already: it is scored, and nothing is trained.
    """

    label: str
    recipe: Mapping[str, Any]
    after: Job | None = None
    silenced: bool = False
    made: str | None = None

    @property
    def key(self) -> str:
        """What decides its outcome, as a hash: the same for the same training, whatever it is called."""
        recipe = {name: value for name, value in self.recipe.items() if name not in _SAYS_NOTHING}
        return _hash([recipe, None if self.after is None else self.after.key, *filter(None, [self.made])])

    def folder(self, out: Path) -> Path:
        """Where it is kept, under the name that the first to ask for this training gave it."""
        made = sorted((out / "runs").glob(f"*-{self.key}"))
        name = re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")
        return made[0] if made else out / "runs" / f"{name}-{self.key}"

    def student(self, out: Path) -> str:
        """Where its student is, once it is trained."""
        return self.made or str(self.folder(out) / "run" / "student")


class Common:
    """What the runs of one process have in common, read and loaded by the first that needs it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._teachers: dict[str, LoadedModel] = {}
        self._texts: dict[str, Known] = {}
        self._examinations: dict[Evaluation, Examination] = {}

    def teacher(self, name: str) -> LoadedModel:
        """The teacher, in host memory."""
        if name not in self._teachers:
            self._teachers[name] = load(name)
        return self._teachers[name]

    def texts(self, teacher: str) -> Known:
        """What has been read with the teacher's tokenizer."""
        return self._texts.setdefault(teacher, {})

    def examination(self, evaluation: Evaluation) -> Examination:
        """What scores students."""
        if evaluation not in self._examinations:
            teacher = self.teacher(evaluation.teacher)
            self._examinations[evaluation] = Examination(evaluation, teacher, device=self.device)
        return self._examinations[evaluation]


#: keys of a recipe that do not decide what comes out
_SAYS_NOTHING = ("output", "checkpoint_every", "log_every", "report_to")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def write_job(job: Job, out: Path, evaluation: Evaluation) -> Path:
    """Writes down what is to be done; returns the run's folder."""
    folder = job.folder(out)
    recipe = dict(job.recipe) | {"output": str(folder / "run")}
    if job.after is not None:
        recipe["student"] = dict(recipe["student"]) | {"base": job.after.student(out)}
    said = {"label": job.label, "recipe": recipe, "made": job.made, "silenced": job.silenced}
    write_json(folder / "job.json", said | {"evaluation": evaluation.as_json()})
    return folder


def work(folder: Path, common: Common, *, say: Say) -> None:
    """Does what ``job.json`` in ``folder`` says, or what is left of it.

    Raises:
        MambifyError: see :func:`mambify.workflows.distill.distill` and :func:`mambify.evaluate.compare.compare`.
    """
    job = read_json(folder / "job.json")
    evaluation, student = Evaluation.from_json(job["evaluation"]), job["made"]
    if student is None:
        student = str(folder / "run" / "student")
        if not Path(student).is_dir():
            _train(parse_recipe(job["recipe"], source=job["label"]), common, say)
    for silenced in (False, True)[: 1 + job["silenced"]]:
        file = folder / scores_name(evaluation, silenced=silenced)
        if not file.is_file():
            start = time.perf_counter()
            scores = common.examination(evaluation).score(student, silenced=silenced, say=say)
            seconds = round(time.perf_counter() - start, 1)
            write_json(file, scores | {"evaluation_seconds": seconds, "environment": environment(common.device)})


def _train(recipe: Recipe, common: Common, say: Say) -> None:
    teacher = common.teacher(recipe.teacher)
    known = common.texts(recipe.teacher)
    distill(recipe, device=common.device, teacher=teacher, known=known, listener=_Teller(say), announce=say)


def scores_name(evaluation: Evaluation, *, silenced: bool) -> str:
    """The file of a student's scores in its run's folder."""
    return f"scores-{'silenced-' * silenced}{_hash(evaluation.as_json())}.json"


def is_done(job: Job, out: Path, evaluation: Evaluation) -> bool:
    """Whether it is trained, and scored in each way that is asked for."""
    return all(is_scored(job, out, evaluation, silenced=silenced) for silenced in (False, True)[: 1 + job.silenced])


def is_scored(job: Job, out: Path, evaluation: Evaluation, *, silenced: bool) -> bool:
    """Whether it is trained, and scored in this way."""
    return (job.folder(out) / scores_name(evaluation, silenced=silenced)).is_file()


def outcome(job: Job, out: Path, evaluation: Evaluation, *, silenced: bool = False) -> dict[str, Any]:
    """What became of a run that is done: its scores, what each stage took, where it is."""
    folder = job.folder(out)
    trained_in = folder / "run" / "environment.json"
    stages = [stage for run in _lineage(job) for stage in summaries(run.folder(out) / "run")]
    scores: dict[str, Any] = read_json(folder / scores_name(evaluation, silenced=silenced))
    return {
        "label": job.label,
        "folder": str(folder),
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "stages": stages,
        "training_environment": None if job.made is not None else read_json(trained_in),
    } | scores


def _lineage(job: Job) -> list[Job]:
    """The run and those it began from, first ones first."""
    return [*([] if job.after is None else _lineage(job.after)), job]


def check(job: Job) -> Recipe:
    """The run's recipe, checked.

    Raises:
        RecipeError: see :func:`mambify.distill.recipe.parse_recipe`.
    """
    return parse_recipe(dict(job.recipe) | {"output": "-"}, source=job.label)


def no_report(_: dict[str, Any]) -> None:
    """A :data:`Report` that nobody reads."""


class _Teller:
    """Says now and then how far a run is."""

    def __init__(self, say: Say) -> None:
        self.say, self.stage, self.last = say, "", 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        ends = progress.step == progress.num_steps
        if progress.stage == self.stage and now - self.last < _TELL_EVERY and not ends:
            return
        self.stage, self.last = progress.stage, now
        figures = "".join(
            f", {name} {progress.figures[name]:.4g}" for name in ("loss", "kl") if name in progress.figures
        )
        self.say(f"{progress.stage}: step {progress.step:,} of {progress.num_steps:,}{figures}")
