"""``mambify distill``: recipe → teacher → text → stages → student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mambify.config import HybridConfig
from mambify.conversion import plan
from mambify.conversion.cut import choose_layers, cut, cut_config, most_frequent
from mambify.distill.arguments import check_launch, check_training_arguments
from mambify.distill.logs import Listener
from mambify.distill.parallel import joined
from mambify.distill.recipe import Recipe
from mambify.distill.run import check_run, inputs_of, open_run, run_stages
from mambify.distill.settings import Kd, Mixing
from mambify.distill.stages import trains_something
from mambify.distill.steps import schedule, steps_of
from mambify.errors import InvalidOptionError, RecipeError, TokenizerMismatchError, UnsupportedError
from mambify.families.load import LoadedModel, load, load_config, require_tokenizer
from mambify.machine import default_device
from mambify.model import HybridForCausalLM
from mambify.tokenization import require_same_tokenizer
from mambify.workflows.texts import Known, Texts


def distill(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str | None = None,
    teacher: LoadedModel | None = None,
    known: Known | None = None,
    save_to: Path | None = None,
    listener: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> tuple[HybridForCausalLM, Path]:
    """Runs a recipe, or what is left of it in its run directory.

    Called in each of several processes (``torchrun``, ``accelerate launch``), it divides the work among them; each of
    them reads teacher and text, the first one writes.

    Args:
        device: ``cpu``, or a GPU; the GPU where there is one by default.
        teacher: already loaded, where the caller has it.
        known: texts that earlier calls with the same tokenizer have read, and what this one reads.
        overwrite: what is in the run directory, and at ``save_to``, is removed first.
        save_to: where the student is saved; the run directory's ``student`` folder by default.
        listener: told of every step, in the first process.
        announce: told in words what begins, in the first process.

    Returns:
        The student, and the run directory.

    Raises:
        UsageError: see :mod:`mambify.errors`; nothing has been written then. Among these: text or weights are not
            those that the run began with.
        TrainingDivergedError, OutputWriteError: the run stopped; the same call continues it.
    """
    check_plan(recipe, teacher)
    check_run(recipe, overwrite=overwrite, save_to=save_to)
    check_launch(recipe)
    with joined(device or default_device()) as processes:
        say = announce if announce is not None and processes.first else lambda _: None
        check_training_arguments(recipe, processes)

        def read() -> tuple[LoadedModel, LoadedModel, Texts]:
            if teacher is None:
                say(f"loading {recipe.teacher}")
            loaded = base = teacher or load(recipe.teacher)
            other = recipe.student.base
            if other is not None and other != recipe.teacher:
                say(f"loading {other}")
                base = load(other)
                require_same_tokenizer(require_tokenizer(loaded), require_tokenizer(base), names=("teacher", "base"))
            say("reading the text")
            texts = Texts(recipe, base, say, known)
            texts.read_all(base)
            return loaded, _cut(base, recipe, texts), texts

        loaded, base, texts = processes.all_do(read)
        inputs = inputs_of(loaded, base, texts.fingerprints())
        run = open_run(recipe, processes, inputs=inputs, overwrite=overwrite, save_to=save_to)
        student = run_stages(
            recipe,
            run,
            teacher=loaded,
            base=base,
            dataset=texts,
            writer=texts.write,
            processes=processes,
            save_to=save_to,
            listener=listener,
            announce=say,
        )
    return student, run


def check_plan(recipe: Recipe, teacher: LoadedModel | None = None) -> None:
    """Refuses a conversion that cannot be, before anything is loaded or written.

    Raises:
        UsageError: the teacher is unknown, or the student section does not fit it.
    """
    config = teacher_config = teacher.model.config if teacher is not None else load_config(recipe.teacher)
    if recipe.student.base is not None:
        config = load_config(recipe.student.base)
        if teacher_config.vocab_size != config.vocab_size:
            raise TokenizerMismatchError(
                f"the teacher has a vocabulary of {teacher_config.vocab_size} tokens and student.base one of "
                f"{config.vocab_size}: distillation compares probabilities token by token"
            )
    if recipe.student.vocabulary is not None:
        _check_vocabulary(recipe)
    if is_cut(recipe):
        layers = _layers_of(recipe, config)
        features = recipe.student.features
        config = cut_config(config, layers, vocabulary=recipe.student.vocabulary, features=features)
    if config.draft_features:
        _check_features(recipe, teacher_config, config)
    steps = steps_of(recipe, config)
    for kept in schedule(recipe.student, config):
        planned = plan(config, mixer=recipe.student.mixer, attention_layers=kept, init=recipe.student.init)
        idle = next((s.stage for s in steps if not trains_something(s.stage, planned.student)), None)
        if idle is not None:
            share = len(kept) / config.num_hidden_layers
            raise InvalidOptionError(
                f"attention {share:g} keeps every layer: nothing is converted, and stage {idle.kind} has nothing to "
                "distil: lower it, or set mlp_learning_rate and rest_learning_rate"
            )
    if recipe.student.mixer != "mamba2" and any(isinstance(stage, Mixing) for stage in recipe.stages):
        raise UnsupportedError(
            f"stage mixing: {recipe.student.mixer} has no one matrix for each head of the attention: "
            "choose mixer mamba2, or stage align or hidden"
        )


def is_cut(recipe: Recipe) -> bool:
    """Whether the student is a draft: of fewer layers or words than what it is made from, or a reader of features."""
    student = recipe.student
    return student.layers is not None or student.vocabulary is not None or student.features


def _layers_of(recipe: Recipe, config: HybridConfig) -> list[int]:
    """The layers that the student has of a base with this configuration."""
    layers, count = recipe.student.layers, config.num_hidden_layers
    if isinstance(layers, list):
        return layers
    return choose_layers(count, count if layers is None else layers, recipe.student.spread)


def _check_vocabulary(recipe: Recipe) -> None:
    for stage in recipe.stages:
        if not isinstance(stage, Kd) or stage.ce_weight:
            raise RecipeError(
                f"stage {stage.kind}: student.vocabulary leaves words without a probability: only stage kd without "
                "ce_weight trains such a student"
            )


def _check_features(recipe: Recipe, teacher: HybridConfig, student: HybridConfig) -> None:
    other = next((stage for stage in recipe.stages if not isinstance(stage, Kd)), None)
    if other is not None:
        raise RecipeError(
            f"stage {other.kind}: a draft that reads hidden states is trained by stage kd only: leave student.features "
            "out, or the stage"
        )
    if not any("rest" in stage.learning_rates for stage in recipe.stages):
        raise RecipeError("what reads hidden states in a draft trains at rest_learning_rate: set it in stage kd")
    if teacher.draft_features:
        raise InvalidOptionError("the teacher is a draft that reads another model's hidden states: give that model")
    if teacher.hidden_size != student.hidden_size:
        raise InvalidOptionError(
            f"the student has a hidden size of {student.hidden_size} and is to read hidden states of "
            f"{teacher.hidden_size}: make it from the teacher, without student.base"
        )


def _cut(base: LoadedModel, recipe: Recipe, texts: Texts) -> LoadedModel:
    """What the student is made from, where that is part of the base only."""
    if not is_cut(recipe):
        return base
    token_ids, wanted = None, recipe.student.vocabulary
    if wanted is not None:
        tokenizer, size = require_tokenizer(base), base.model.config.vocab_size
        special = [i for i in tokenizer.all_special_ids if i < size]
        token_ids = most_frequent(texts.token_ids(recipe.stages[0]), wanted, size, always=special)
    layers = _layers_of(recipe, base.model.config)
    shallow = cut(base, layers, token_ids=token_ids, features=recipe.student.features)
    return LoadedModel(shallow, base.tokenizer, base.source, base.family)
