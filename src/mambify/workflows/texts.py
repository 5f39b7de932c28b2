"""The text of a recipe's stages: each read once, checked against its held-out text, and cut to what the stage takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mambify.data.documents import Document, Split, read_documents
from mambify.data.overlap import check_disjoint
from mambify.data.packing import PackedDataset, pack
from mambify.data.preferences import PreferenceDataset, Preferences, describe, read_preferences
from mambify.data.sequences import SequenceWriter, prompts_of
from mambify.distill.recipe import Recipe
from mambify.distill.sections import Data
from mambify.distill.settings import Dpo, OnPolicy, Stage
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.model import HybridForCausalLM

T = TypeVar("T")

#: what a text is made of → the text
Known = dict[tuple[object, ...], Any]

_KEPT = ("blocks", "pairs", "prompts")


class Texts:
    """What each stage trains on; stages that ask for the same text share it.

    Args:
        model: whose tokenizer reads it.
        announce: told in words what was read.
        known: what others have read with the same tokenizer; what is read here is added.

    Raises (when a stage's text is asked for):
        UsageError: a source that cannot be read, or too little text for one block.
        DataOverlapError: training and held-out text share documents.
    """

    def __init__(
        self, recipe: Recipe, model: LoadedModel, announce: Callable[[str], None], known: Known | None = None
    ) -> None:
        self.recipe, self.tokenizer, self.announce = recipe, require_tokenizer(model), announce
        self._known: Known = {} if known is None else known

    def __call__(self, stage: Stage) -> PackedDataset | PreferenceDataset | None:
        """The stage's data set; ``None`` where an on-policy stage takes nothing but what the student writes."""
        data = self.recipe.data_of(stage)
        if isinstance(stage, Dpo):
            return self._once(("pairs", data), lambda: self._pairs(data, own_heldout=stage.data.heldout is not None))
        if isinstance(stage, OnPolicy) and stage.share == 1:
            return None
        return self._once(("blocks", data, self.recipe.seed), lambda: self._blocks(data))

    def fingerprints(self) -> list[str | None]:
        """A hash of what each stage of the recipe trains on; ``None`` where that is nothing."""
        found = [self(stage) for stage in self.recipe.stages]
        return [None if dataset is None else dataset.fingerprint for dataset in found]

    def token_ids(self, stage: Stage) -> Tensor:
        """All tokens that a stage of blocks is trained on."""
        blocks = self(stage)
        assert isinstance(blocks, PackedDataset)
        return blocks.input_ids()

    def writer(self, stage: OnPolicy) -> SequenceWriter:
        """What has a student write the stage's texts."""
        data, prompts = self.recipe.data_of(stage), None
        if stage.prompts == "data":
            longest = data.context_length // 2
            prompts = self._once(("prompts", data), lambda: prompts_of(self._documents(data), longest=longest))
        return SequenceWriter(
            self.tokenizer,
            data.context_length,
            kind="auto" if stage.prompts == "data" else stage.prompts,
            prompts=prompts,
            temperature=stage.sampling_temperature,
            top_k=stage.top_k,
            max_new_tokens=stage.max_new_tokens,
            batch_size=stage.sampling_batch,
        )

    def read_all(self, model: LoadedModel) -> None:
        """Reads the text of every stage, and tries whether ``model`` could write what is to be written."""
        for stage in self.recipe.stages:
            self(stage)
            if isinstance(stage, OnPolicy):
                self.writer(stage).sampler(model.model)
        # The documents themselves are no longer needed, and there may be gigabytes of them.
        for key in [key for key in self._known if key[0] not in _KEPT]:
            del self._known[key]

    def write(self, stage: OnPolicy, student: HybridForCausalLM, seed: int, count: int) -> dict[str, Tensor]:
        """Has ``student`` write ``count`` sequences for the stage."""
        return self.writer(stage).write(student, count, seed=seed)

    def _once(self, key: tuple[object, ...], read: Callable[[], T]) -> T:
        key = tuple(part.model_dump_json() if isinstance(part, Data) else part for part in key)
        if key not in self._known:
            self._known[key] = read()
        found: T = self._known[key]
        return found

    def _blocks(self, data: Data) -> PackedDataset:
        return pack(
            self._documents(data),
            data.context_length,
            seed=self.recipe.seed,
            mode=data.packing,
            answers_only=data.answers_only,
        )

    def _documents(self, data: Data) -> list[Document]:
        def read() -> list[Document]:
            source = list(data.train.items()) if isinstance(data.train, dict) else data.train
            train = read_documents(source, self.tokenizer, split="train")
            if data.heldout is not None:
                check_disjoint(train, self._heldout(data.heldout))
            return train

        return self._once(("documents", repr(data.train), data.heldout), read)

    def _heldout(self, source: str) -> list[Document]:
        """The held-out side of ``source``: of a synthesized directory its own split, of anything else all of it."""
        split: Split = "heldout" if (Path(source) / "manifest.json").is_file() else "all"
        return self._once(("heldout", source), lambda: read_documents(source, self.tokenizer, split=split))

    def _pairs(self, data: Data, *, own_heldout: bool) -> PreferenceDataset:
        read = self._preferences(data.train)
        if data.heldout is not None:
            heldout = self._preferences(data.heldout).documents() if own_heldout else self._heldout(data.heldout)
            check_disjoint(read.documents(), heldout)
        pairs = PreferenceDataset(read.pairs, data.context_length, dropped=read.dropped)
        self.announce(f"{data.train}: {describe(len(pairs), pairs.dropped)}")
        return pairs

    def _preferences(self, source: Any) -> Preferences:
        return self._once(("preferences", repr(source)), lambda: read_preferences(source, self.tokenizer))
