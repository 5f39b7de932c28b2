"""``mambify draft``: a draft cut from a model, trained on its distribution, and measured by what of it is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambify.conversion.cut import choose_layers
from mambify.data.documents import Document, Split, read_documents
from mambify.data.manifest import is_synthesized
from mambify.data.packing import pack
from mambify.data.sequences import prompts_of
from mambify.decode import stop_ids
from mambify.distill.arguments import use_bfloat16
from mambify.distill.logs import Listener
from mambify.distill.parallel import process_rank
from mambify.distill.recipe import Recipe, load_recipe
from mambify.distill.run import check_run, in_dtype
from mambify.engine import rounded_shares
from mambify.errors import InvalidOptionError, RecipeError, did_you_mean
from mambify.evaluate.acceptance import expected_acceptance, measured_acceptance
from mambify.families.load import LoadedModel, load, load_config, require_tokenizer
from mambify.hub import update_card
from mambify.io import require_room, write_json
from mambify.machine import default_device
from mambify.model import HybridForCausalLM
from mambify.workflows.distill import check_plan, distill

#: file beside a draft's weights that says what of it is accepted
REPORT = "acceptance.json"
#: what a draft's mixers may be → the keys of ``student`` that say it
MIXERS: dict[str, dict[str, Any]] = {
    "keep": {"attention": 1.0},
    "attention": {"attention": 1.0},
    "mamba2": {"attention": 0.0, "mixer": "mamba2"},
    "mamba1": {"attention": 0.0, "mixer": "mamba1"},
}
#: the recipe where none is named
RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-draft.yaml"


@dataclass(frozen=True)
class Settings:
    """What is asked for beside a recipe; ``None`` leaves it as the recipe has it.

    Attributes:
        layers: how many layers of the target, or which.
        spread: which ones, where a number is given.
        mixer: a key of :data:`MIXERS`; ``attention`` insists that the layers are that.
        data: text of the target; the first of it also gives the held-out text.
        tokens: those of all stages together.
        vocabulary: how many words the head knows.
        features: whether the draft reads its target's hidden states.
        overrides: further changes, ``key.path=value``.
    """

    layers: int | Sequence[int] | None = None
    spread: str | None = None
    mixer: str | None = None
    data: Sequence[str] = ()
    tokens: int | None = None
    vocabulary: int | None = None
    features: bool | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Measure:
    """How acceptance is measured after training.

    Attributes:
        num_draft_tokens: K, of a run each; the expectation is for the largest, and for 1 where a draft reads hidden
            states.
        temperatures: of a run each.
        num_prompts: of held-out text, which the target answers with the draft.
        max_new_tokens: of each answer.
        expected_tokens: of held-out text, for the expectation.
    """

    num_draft_tokens: Sequence[int] = (4, 8)
    temperatures: Sequence[float] = (0.0, 1.0)
    num_prompts: int = 32
    max_new_tokens: int = 128
    expected_tokens: int = 65536


def draft_recipe(target: str, settings: Settings, *, recipe: str | Path | None, out: Path) -> Recipe:
    """The recipe that a draft for ``target`` is trained by; its run is kept in ``OUT.run``.

    Raises:
        RecipeError: no text, or a recipe that cannot be.
        InvalidOptionError: an unknown mixer, or layers that are not of the wanted kind.
    """
    if recipe is None and not settings.data:
        raise RecipeError("a draft is trained on text of its target: give --data DIR, made by mambify synthesize")
    if settings.mixer is not None and settings.mixer not in MIXERS:
        raise InvalidOptionError(f"unknown mixer '{settings.mixer}': {did_you_mean(settings.mixer, MIXERS)}")
    changes: dict[str, Any] = {"teacher": target, "output": f"{out}.run"}
    for key in ("layers", "spread", "vocabulary", "features"):
        if (value := getattr(settings, key)) is not None:
            changes[f"student.{key}"] = value
    if settings.mixer is not None:
        changes |= {f"student.{key}": value for key, value in MIXERS[settings.mixer].items()}
    if settings.data:
        changes |= {"data.train": list(settings.data), "data.heldout": _heldout(settings.data)}
    path = RECIPE if recipe is None else recipe
    # JSON is YAML, whatever characters a path has.
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *settings.overrides]
    read = load_recipe(path, overrides)
    if settings.tokens is not None:
        total = sum(stage.tokens for stage in read.stages)
        parts = (f"stages.{i}.tokens={settings.tokens * stage.tokens // total}" for i, stage in enumerate(read.stages))
        read = load_recipe(path, [*overrides, *parts])
    if read.student.layers is None:
        raise RecipeError(f"{path} does not say which layers a draft has: set student.layers, or give --layers 2")
    if settings.mixer == "attention":
        _require_attention(target, read)
    return read


def _heldout(data: Sequence[str]) -> str | None:
    """The first source that keeps held-out text apart."""
    return next((source for source in data if is_synthesized(Path(source))), None)


def _require_attention(target: str, recipe: Recipe) -> None:
    config = load_config(recipe.student.base or target)
    layers = recipe.student.layers
    assert layers is not None and config.layer_mixers is not None
    if isinstance(layers, int):
        layers = choose_layers(config.num_hidden_layers, layers, recipe.student.spread)
    other = [i for i in layers if config.layer_mixers[i] != "attention"]
    if other:
        raise InvalidOptionError(
            f"layer {other[0]} of {target} is {config.layer_mixers[other[0]]}: name layers that have attention, of "
            f"{','.join(map(str, config.attention_layers)) or 'none'}, or take --mixer keep"
        )


def draft(
    recipe: Recipe,
    out: str | Path,
    *,
    measure: Measure | None = None,
    overwrite: bool = False,
    device: str | None = None,
    target: LoadedModel | None = None,
    listener: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Trains the draft of ``recipe``, or what is left of it, and saves it as the directory ``out``.

    Args:
        measure: how acceptance is measured; ``None`` for the defaults.
        target: already loaded, where the caller has it.

    Returns:
        What :data:`REPORT` in ``out`` says; ``None`` in all processes but the first.

    Raises:
        OutputExistsError: something else is at ``out``.
        UsageError, TrainingDivergedError, OutputWriteError: see :func:`mambify.workflows.distill.distill`.
    """
    out = Path(out)
    if process_rank() == 0:
        check_run(recipe, overwrite=overwrite, save_to=out)  # what is at ``out`` stays until all else is right
        require_room(out)
    check_plan(recipe, target)
    place, measure = device or default_device(), measure or Measure()
    loaded = target or load(recipe.teacher)
    text = _text_to_measure(recipe, loaded, measure)  # before hours of training
    trained, _ = distill(
        recipe, overwrite=overwrite, device=device, teacher=loaded, save_to=out, listener=listener, announce=announce
    )
    if process_rank() != 0:
        return None
    if announce is not None:
        announce("measuring what is accepted")
    dtype = torch.bfloat16 if use_bfloat16(recipe.precision, place) else torch.float32
    report = acceptance_report(
        LoadedModel(in_dtype(loaded.model, dtype, place), loaded.tokenizer, loaded.source, loaded.family),
        in_dtype(trained, dtype, place),
        text,
        measure,
    )
    write_json(out / REPORT, report)
    update_card(out, [{"acceptance": report}])
    return report


class TextToMeasure(NamedTuple):
    """Held-out text in two forms.

    Attributes:
        input_ids, labels: blocks ``[N, T]``; labels are -100 where the text is not the model's own.
        prompts: token ids that the target is to go on from.
    """

    input_ids: Tensor
    labels: Tensor
    prompts: Sequence[Sequence[int]]


def text_to_measure(documents: Sequence[Document], measure: Measure, *, context_length: int = 512) -> TextToMeasure:
    """Cuts documents into what :func:`acceptance_report` takes.

    Raises:
        UsageError: too little text for a block or for a prompt.
    """
    blocks = pack(documents, context_length, seed=0, answers_only=True)
    count = min(max(measure.expected_tokens // context_length, 1), len(blocks))
    items = [blocks[index] for index in range(count)]
    prompts = prompts_of(documents, longest=context_length)[: measure.num_prompts]
    return TextToMeasure(
        torch.stack([item["input_ids"] for item in items]), torch.stack([item["labels"] for item in items]), prompts
    )


def _text_to_measure(recipe: Recipe, target: LoadedModel, measure: Measure) -> TextToMeasure:
    """The recipe's held-out text; what the training text keeps apart where it names none."""
    source: Any = recipe.data.heldout
    split: Split = "all"
    if source is None:
        train = recipe.data.train
        source, split = list(train.items()) if isinstance(train, dict) else train, "heldout"
    elif is_synthesized(Path(source)):
        split = "heldout"
    documents = read_documents(source, require_tokenizer(target), split=split)
    return text_to_measure(documents, measure, context_length=recipe.data.context_length)


def acceptance_report(
    target: LoadedModel, draft: HybridForCausalLM, text: TextToMeasure, measure: Measure
) -> dict[str, Any]:
    """What of a draft is accepted: expected from the probabilities of a text, and measured on its prompts.

    Args:
        target: in the dtype and place that it is to run in; the draft likewise.
        text: of the target, that the draft was not trained on.

    Raises:
        InvalidOptionError: no answer in the text is as long as a round.
    """
    # What follows the first token of a round is guessed from the draft's own states, which only rounds have.
    K = 1 if draft.config.draft_features else max(measure.num_draft_tokens)
    expected = expected_acceptance(target.model, draft, text.input_ids, text.labels, num_draft_tokens=K)
    stops = sorted(stop_ids(target.model, require_tokenizer(target)))
    return {
        "target": target.source,
        "layers": draft.config.cut_from,
        "vocabulary": draft.config.draft_vocabulary,
        "features": draft.config.draft_features,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "device": str(target.model.device),
        "expected": {
            "temperature": 1.0,
            "num_draft_tokens": K,
            "positions": expected.positions,
            "tokens_per_round": round(expected.tokens_per_round, 4),
            "acceptance_by_position": rounded_shares(expected.acceptance_by_position),
            "known_probability": round(expected.known_probability, 4),
        },
        "measured": [
            measured_acceptance(
                target.model,
                draft,
                text.prompts,
                num_draft_tokens=number,
                temperature=temperature,
                max_new_tokens=measure.max_new_tokens,
                stop_ids=stops,
            )
            for temperature in measure.temperatures
            for number in measure.num_draft_tokens
        ],
    }
