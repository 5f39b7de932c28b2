"""The sections of a recipe that say what is converted and on which text; the stages have a file of their own."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: object) -> object:
    """``"1.6M"`` → 1600000; integers pass. (k, M and B are powers of ten.)"""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kKmMbB]?)", value.strip().replace("_", ""))
        if match:
            return round(float(match[1]) * _UNITS[match[2].lower()])
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
CountOrNone = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Source = str | list[str] | dict[str, float]
ContextLength = Annotated[int, Field(ge=8)]
Packing = Literal["concat", "documents"]


class Section(BaseModel):
    """A mapping whose keys are all known and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Student(Section):
    """What is converted, and how far, all at once or in several steps.

    Attributes:
        base: the model that is converted; the teacher itself by default.
        layers: which of its layers the student has, or how many; all by default. Fewer make a draft.
        spread: which ones where a number is given: ``even``, ``ends`` or ``first``.
        vocabulary: how many words the student's head knows, the most frequent of the training text; all by default.
        features: whether a draft reads its target's hidden states beside the tokens.
        mixer, init: what replaces attention, and how it starts.
        attention: share of the layers that keep attention. A list of falling shares is a progressive schedule.
        attention_layers: the layers that keep attention, instead of a share; a list of shrinking lists is a schedule.
        stepwise: how many layers each step converts on the way there (``true``: one); 0 converts them all at once.
        order: the layers in the order in which a stepwise conversion takes them.
    """

    base: str | None = None
    layers: Annotated[int, Field(gt=0)] | list[int] | None = None
    spread: Literal["even", "ends", "first"] = "even"
    vocabulary: Annotated[int, Field(gt=0)] | None = None
    features: bool = False
    mixer: str = "mamba2"
    attention: Share | list[Share] = 0.5
    attention_layers: list[int] | list[list[int]] | None = None
    stepwise: Annotated[int, Field(ge=0)] = 0
    order: list[int] | None = None
    init: str = "identity"

    @property
    def schedule(self) -> list[float]:
        """The attention shares in turn; one where there is no schedule of them."""
        return list(self.attention) if isinstance(self.attention, list) else [self.attention]

    @property
    def layer_lists(self) -> list[list[int]]:
        """The explicit lists of layers that keep attention, in turn; none where shares say it."""
        lists = self.attention_layers
        if lists is None:
            return []
        nested = [entry for entry in lists if isinstance(entry, list)]
        return nested or [[entry for entry in lists if isinstance(entry, int)]]

    @model_validator(mode="after")
    def _falls(self) -> Student:
        shares, lists = self.schedule, self.layer_lists
        if not shares or any(b >= a for a, b in itertools.pairwise(shares)):
            raise ValueError(f"attention {shares} must fall from step to step")
        if any(not set(b) < set(a) for a, b in itertools.pairwise(lists)):
            raise ValueError(f"attention_layers {lists} must shrink from step to step, and take no layer back")
        if lists and len(shares) > 1:
            raise ValueError("attention_layers and a progressive attention schedule exclude each other")
        if self.stepwise and max(len(shares), len(lists)) > 1:
            raise ValueError("stepwise needs one share or one list of layers to end at, not a schedule")
        if self.order is not None and not self.stepwise:
            raise ValueError("order belongs to a stepwise conversion: set stepwise as well")
        return self


class Data(Section):
    """The text: a directory made by ``mambify synthesize``, files, Hub data sets, or a weighted list of them."""

    train: Source
    heldout: str | None = None
    context_length: ContextLength = 512
    packing: Packing = "concat"
    answers_only: bool = False


def sources_of(data: Data) -> list[str]:
    """All that the text is read from."""
    train = [data.train] if isinstance(data.train, str) else list(data.train)
    return train if data.heldout is None else [*train, data.heldout]


class StageData(Section):
    """In what a stage's text differs from the recipe's: the keys of :class:`Data` that are not ``None``."""

    train: Source | None = None
    heldout: str | None = None
    context_length: ContextLength | None = None
    packing: Packing | None = None
    answers_only: bool | None = None
