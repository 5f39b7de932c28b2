"""``mambify distill``: recipe → teacher → text → stages → student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mambify.conversion import plan
from mambify.data.documents import Document, read_documents
from mambify.data.overlap import check_disjoint
from mambify.data.packing import PackedDataset, pack
from mambify.distill.logs import Listener
from mambify.distill.parallel import joined
from mambify.distill.recipe import Recipe
from mambify.distill.run import open_run, run_stages
from mambify.distill.stages import check_launch, check_training_arguments
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel, load, load_config, require_tokenizer
from mambify.machine import default_device
from mambify.model import HybridForCausalLM


def distill(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str | None = None,
    teacher: LoadedModel | None = None,
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
        save_to: where the student is saved; the run directory's ``student`` folder by default.
        listener: told of every step, in the first process.
        announce: told in words what begins, in the first process.

    Returns:
        The student, and the run directory.

    Raises:
        UsageError: see :mod:`mambify.errors`; nothing has been written then.
        TrainingDivergedError, OutputWriteError: the run stopped; the same call continues it.
    """
    check_plan(recipe, teacher)
    check_launch(recipe)
    with joined(device or default_device()) as processes:
        say = announce if announce is not None and processes.first else lambda _: None
        check_training_arguments(recipe, processes)

        def read() -> tuple[LoadedModel, PackedDataset]:
            if teacher is None:
                say(f"loading {recipe.teacher}")
            loaded = teacher or load(recipe.teacher)
            say("reading the text")
            return loaded, training_blocks(recipe, loaded)

        loaded, dataset = processes.all_do(read)
        run = open_run(recipe, processes, overwrite=overwrite)
        student = run_stages(
            recipe,
            run,
            teacher=loaded,
            dataset=dataset,
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
    config = teacher.model.config if teacher is not None else load_config(recipe.teacher)
    for share in recipe.student.schedule:
        planned = plan(
            config,
            mixer=recipe.student.mixer,
            attention=share,
            attention_layers=recipe.student.attention_layers,
            init=recipe.student.init,
        )
        if not planned.student.converted_layers:
            raise InvalidOptionError(f"attention {share:g} keeps every layer: nothing is converted, nothing to distil")


def training_blocks(recipe: Recipe, teacher: LoadedModel) -> PackedDataset:
    """The recipe's training text as blocks; checked to share nothing with its held-out text.

    Raises:
        UsageError: a source that cannot be read, or too little text for one block.
        DataOverlapError: training and held-out text share documents.
    """
    tokenizer, data = require_tokenizer(teacher), recipe.data
    source = list(data.train.items()) if isinstance(data.train, dict) else data.train
    train = list(read_documents(source, tokenizer, split="train"))
    if data.heldout is not None:
        check_disjoint(train, heldout_documents(data.heldout, teacher))
    return pack(train, data.context_length, seed=recipe.seed, mode=data.packing, answers_only=data.answers_only)


def heldout_documents(source: str, teacher: LoadedModel) -> list[Document]:
    """The held-out side of ``source``: of a synthesized directory its own split, of anything else all of it."""
    synthesized = (Path(source) / "manifest.json").is_file()
    return list(read_documents(source, require_tokenizer(teacher), split="heldout" if synthesized else "all"))
