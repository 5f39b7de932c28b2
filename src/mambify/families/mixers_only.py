"""A directory that holds only what is not the teacher's: on reading, its base's weights come to it.

    config.json           the configuration, with ``base``: the base model's name and the fingerprint of what it gives
    mixers.safetensors    the new mixers, and whatever else was trained; of a draft's head the words that it knows
    checksums.json, tokenizer, model card …    as of any model that was saved

The fingerprint is of the values that are taken from the base, as the base stores them. So the base may lie anywhere and
in any form; one whose weights differ by a bit is refused.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.errors import CheckpointError, MissingDependencyError, UnknownSourceError
from mambify.families import safetensors
from mambify.families.checkpoint import Checkpoint, open_checkpoint
from mambify.families.sources import Source, resolve
from mambify.hub import complete_with
from mambify.model import HybridForCausalLM

MIXERS = "mixers.safetensors"
HEAD, KNOWN = "lm_head.weight", "lm_head.token_ids"


def completed(where: Source, checkpoint: Checkpoint) -> Checkpoint:
    """The whole model of a directory that holds mixers only.

    Raises:
        UnknownSourceError, MissingDependencyError: the base cannot be found.
        CheckpointError: the base holds mixers only itself, or is not described well.
    """
    config = copy.deepcopy(checkpoint.config)
    config.base = None

    def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in whole_weights(where.directory, checkpoint.config) if wanted(name))

    return replace(checkpoint, config=config, read=read)


def whole_weights(directory: Path, config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of the mixers, then of all that the base gives; the end is reached only if it is the base.

    Raises:
        UnknownSourceError, MissingDependencyError: the base cannot be found.
        CheckpointError: a file is not what was saved, or the base is another one.
    """
    name, fingerprint = _described_base(directory, config)
    base = open_base(name, f"{directory} holds mixers only, and its base")
    wanted = _weight_names(config)
    safetensors.verify_checksums(directory)
    known_W: Tensor | None = None
    for own, tensor in safetensors.read_file(directory / MIXERS):
        wanted.discard(own)
        known_W = tensor if own == KNOWN else known_W
        yield own, tensor
    rows_of = None
    if known_W is not None and HEAD in wanted:
        rows_of = head_of(base.config)
        wanted.remove(HEAD)
    reading = Fingerprint()
    for name_of_base, tensor in reading.watch(base.weights((wanted | {rows_of}).__contains__)):
        if name_of_base == rows_of:
            yield HEAD, tensor[known_W]
        if name_of_base in wanted:
            yield name_of_base, tensor
    if reading.value() != fingerprint:
        raise CheckpointError(
            f"'{name}' is not the base that {directory} was made with: its weights have the fingerprint "
            f"{reading.value()[:12]}, and {fingerprint[:12]} is needed"
        )


def head_of(config: HybridConfig) -> str:
    """The weight that is a base's output head."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else HEAD


def _described_base(directory: Path, config: HybridConfig) -> tuple[str, str]:
    match config.base:
        case {"name": str(name), "fingerprint": str(fingerprint)}:
            return name, fingerprint
    raise CheckpointError(f"{directory / 'config.json'} does not say which base and fingerprint its mixers need")


def open_base(name: str, whose: str) -> Checkpoint:
    """The base called ``name``; ``whose`` begins the sentence that says why it is needed.

    Raises:
        UnknownSourceError, MissingDependencyError: it cannot be found.
        CheckpointError: it is none.
    """
    try:
        checkpoint = open_checkpoint(resolve(name))
    except (UnknownSourceError, MissingDependencyError) as error:
        raise type(error)(f"{whose} '{name}' is not here: {error}") from error
    if checkpoint.config.base is not None:
        raise CheckpointError(f"{whose} '{name}' holds mixers only itself: a base is a whole model")
    return checkpoint


def _weight_names(config: HybridConfig) -> set[str]:
    """The weights of a model; of tied ones the first."""
    with torch.device("meta"):
        names = set(HybridForCausalLM(config).state_dict())
    return names - {"lm_head.weight"} if config.tie_word_embeddings else names


class Fingerprint:
    """SHA-256 over names, dtypes, shapes and values of weights, in whatever order they come.

    A weight is hashed while the next one is read; no more than two are held for it.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes ``weights`` on and notes them."""
        last: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1) as worker:
            for name, tensor in weights:
                if last is not None:
                    last.result()
                last = worker.submit(self.add, name, tensor)
                yield name, tensor

    def add(self, name: str, tensor: Tensor) -> None:
        """Notes one weight."""
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        self._digests[name] = f"{kind} {hashlib.sha256(content.data).hexdigest()}"

    def value(self) -> str:
        """The fingerprint of what was noted."""
        lines = "".join(f"{name} {self._digests[name]}\n" for name in sorted(self._digests))
        return hashlib.sha256(lines.encode()).hexdigest()


complete_with(whole_weights)
