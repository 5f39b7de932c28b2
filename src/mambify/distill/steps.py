"""A recipe as a list of work: which stage at which point of the conversion, and for how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from mambify.config import ATTENTION, HybridConfig
from mambify.conversion.plan import uniform_attention_layers
from mambify.distill.recipe import Recipe
from mambify.distill.sections import Student
from mambify.distill.settings import Stage
from mambify.errors import InvalidOptionError, RecipeError

#: shares that a whole conversion passes through, where a stepwise one is not told its order
_FALLING = (0.75, 0.5, 0.25, 0.125, 0.0)


@dataclass(frozen=True)
class Step:
    """One entry of the work list: a stage at one point of the conversion.

    Attributes:
        name: directory name, ``01-align``.
        stage: the recipe's stage, with the tokens of this step.
        attention_layers: the layers that keep attention from here on.
        attention: their share of all layers.
    """

    name: str
    stage: Stage
    attention_layers: tuple[int, ...]
    attention: float


def schedule(student: Student, config: HybridConfig) -> list[list[int]]:
    """The layers that keep attention after each step of the conversion.

    Raises:
        InvalidOptionError: a stepwise ``order`` that is not of the layers to be converted.
    """
    attention = [i for i, name in enumerate(config.layer_mixers or ()) if name == ATTENTION]
    explicit = student.layer_lists
    targets = explicit or [_of_share(share, attention, config) for share in student.schedule]
    if not student.stepwise:
        return targets
    wanted = set(attention) - set(targets[-1])
    order = student.order if student.order is not None else _uniform_order(wanted, attention, config)
    if sorted(order) != sorted(wanted):
        raise InvalidOptionError(f"order {order} must name each layer to be converted once: {sorted(wanted)}")
    ends = [*range(student.stepwise, len(order), student.stepwise), len(order)]
    return [[i for i in attention if i not in order[:end]] for end in ends]


def _of_share(share: float, attention: list[int], config: HybridConfig) -> list[int]:
    """The layers of a share, of those that have attention: what is converted already stays so."""
    return [i for i in uniform_attention_layers(config.num_hidden_layers, share) if i in attention]


def _uniform_order(wanted: set[int], attention: list[int], config: HybridConfig) -> list[int]:
    """``wanted`` as falling shares would convert them."""
    order: list[int] = []
    for share in _FALLING:
        kept = _of_share(share, attention, config)
        order += [i for i in attention if i in wanted and i not in kept and i not in order]
    return order


def steps_of(recipe: Recipe, config: HybridConfig) -> list[Step]:
    """The recipe's stages at each step of its conversion; those that come last at the last one only.

    Args:
        config: of the model that is converted.

    Raises:
        RecipeError: a stage whose tokens, divided among the steps, are less than one batch.
        InvalidOptionError: see :func:`schedule`.
    """
    points = schedule(recipe.student, config)
    steps: list[Step] = []
    for point, kept in enumerate(points):
        for stage in recipe.stages:
            if stage.at == "every_step":
                part = _part(stage, len(points))
            elif point == len(points) - 1:
                part = stage
            else:
                continue
            name = f"{len(steps) + 1:02d}-{stage.kind}"
            steps.append(Step(name, part, tuple(kept), round(len(kept) / config.num_hidden_layers, 4)))
    return steps


def _part(stage: Stage, count: int) -> Stage:
    """The stage with one of ``count`` equal parts of its tokens."""
    tokens = stage.tokens // count
    if count > 1 and tokens < stage.batch_tokens:
        raise RecipeError(
            f"stage {stage.kind}: {stage.tokens} tokens are less than a batch of {stage.batch_tokens} for each of the "
            f"{count} steps of the conversion: at least {count * stage.batch_tokens} are needed"
        )
    return stage.model_copy(update={"tokens": tokens})
