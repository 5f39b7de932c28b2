"""What can be asked of an experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mambify.distill.presets import preset_file
from mambify.distill.sections import parse_count
from mambify.errors import InvalidOptionError, UnknownSourceError

#: of the questions of zero-shot tasks, those that can be had as files
TASKS = ("arc_easy", "piqa", "openbookqa", "commonsense_qa")


@dataclass(frozen=True)
class Request:
    """The options of an experiment; each takes those that say something there.

    Attributes:
        tokens: budgets of training, each student's.
        recipes: presets to train with; ``NAME@TOKENS`` has a budget of its own.
        attention: share of layers that keep attention, where the experiment does not vary it.
        teacher: as everywhere.
        data: directories of synthesized text to train and be scored on; none: sampled from the teacher.
        text: further files to be scored on.
        instruct, preferences, heldout_preferences: text of the stages ``sft`` and ``dpo``, and pairs to be scored on.
        student: one that is there already, to be tuned in place of those that the experiment would distil.
        tuning_tokens: of each of these stages; a tenth of ``tokens`` by default.
        tuning: changes to them, ``KIND.KEY=VALUE``.
        tasks, data_dir, limit: zero-shot tasks, their files, and how many questions of each.
        out: where runs are kept.
        parallel: runs at a time.
        seed: of everything drawn at random.
        batch_tokens, context_length: of training, and of the blocks that are scored.
        max_tokens: of each text at most about so many are scored.
        changes: to the preset of each student that is distilled, as ``mambify distill`` takes them.
    """

    tokens: tuple[int, ...]
    recipes: tuple[str, ...]
    attention: float = 0.5
    teacher: str = "smollm2"
    data: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    instruct: str | None = None
    preferences: str | None = None
    heldout_preferences: str | None = None
    student: str | None = None
    tuning_tokens: int | None = None
    tuning: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    limit: int | None = None
    out: Path = Path("runs/bench")
    parallel: int = 1
    seed: int = 0
    batch_tokens: int = 16384
    context_length: int = 512
    max_tokens: int = 131_072
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens or not self.recipes:
            raise InvalidOptionError("name at least one budget of tokens and one recipe")
        for entry in self.recipes:
            name, _, own = entry.partition("@")
            preset_file(name)
            if own:
                parse_budget(own, name)
        for what, names in (("tokens", self.tokens), ("recipes", self.recipes)):
            if len(set(names)) < len(names):
                raise InvalidOptionError(f"--{what} names one twice: {', '.join(map(str, names))}")
        if not 0 <= self.attention < 1:
            raise InvalidOptionError(f"attention {self.attention:g} is out of range: give a share from 0, below 1")
        if self.parallel < 1:
            raise InvalidOptionError(f"parallel must be at least 1, not {self.parallel}")
        for path in self.data:
            if not (Path(path) / "manifest.json").is_file():
                raise UnknownSourceError(f"no synthesized text at {path}: --data takes what `mambify synthesize` wrote")
        files = (*self.text, self.instruct, self.preferences, self.heldout_preferences)
        for file in files:
            if file is not None and not Path(file).is_file():
                raise UnknownSourceError(f"no file {file}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UnknownSourceError(f"no directory {self.data_dir}")
        if self.data_dir is None and (self.tasks or self.limit is not None):
            raise InvalidOptionError("tasks are read from files here: give --data-dir DIR too")
        if self.preferences is not None and self.heldout_preferences is None:
            raise InvalidOptionError("--preferences trains: give --heldout-preferences FILE too, to be scored on")
        if self.student is not None and self.instruct is None and self.preferences is None:
            raise InvalidOptionError("--student is tuned: give --instruct FILE or --preferences FILE")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks to run; none where there are no files for them."""
        return (self.tasks or TASKS) if self.data_dir is not None else ()

    def with_data(self, data: tuple[str, ...]) -> Request:
        """The same on other text."""
        return replace(self, data=data)


def parse_budget(text: str, name: str) -> int:
    """The tokens of ``NAME@TOKENS``.

    Raises:
        InvalidOptionError: no number of tokens.
    """
    count = parse_count(text)
    if not isinstance(count, int) or count < 1:
        raise InvalidOptionError(f"{name}@{text}: '{text}' is no number of tokens: write it like 500k, 20M or 1B")
    return count
