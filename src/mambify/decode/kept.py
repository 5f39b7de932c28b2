"""Decoders that outlive a call: buffers and recorded graphs, made once for calls that are alike.

``generate`` and ``stream`` would otherwise make them anew each time, which on a GPU takes longer than a short answer. A
decoder belongs to its model and goes with it: what is kept holds the model's layers but not the model itself. While it
works it is nobody else's, so answers that come side by side have a decoder each.

Weights may change where they lie, as in training: every run begins by making anew what is made of them. Where a weight
or a module was replaced, or moved, decoders of before are dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from mambify.decode.adapters import unwrapped
from mambify.decode.decoder import Decoder, decoder_for
from mambify.decode.drafts import cut_if_named
from mambify.engine import DraftCount, Sampling, Speculator
from mambify.engine.fused_parts import is_hooked
from mambify.engine.memory import sequence_bytes
from mambify.engine.pace import MOST_DRAFTED
from mambify.machine import free_memory
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mambify.decode.drafts import Draft

_MOST = 2  # decoders of a model
_SHARE = 0.1  # of the free memory, that one of them may take
_LEAST = 256  # tokens of a slot
_KNOWN = ("torch.", "transformers.", "mambify.")  # packages whose modules are what their weights and types say


class _Wanted(NamedTuple):
    """What a decoder must have been made for; ``draft`` is a reference that does not hold it, or a name."""

    draft: object
    num_draft_tokens: DraftCount
    sampling: Sampling
    stop_ids: tuple[int, ...]
    num_slots: int


#: of the model and of the draft; see :func:`_weights`
_Weights: TypeAlias = tuple[list[object], list[object]]


@dataclass(eq=False)
class _Kept:
    wanted: _Wanted
    weights: _Weights
    speculator: Speculator


_kept: WeakKeyDictionary[HybridForCausalLM, list[_Kept]] = WeakKeyDictionary()


def release(model: PreTrainedModel) -> None:
    """Lets go of the buffers and graphs that earlier calls of ``generate`` and ``stream`` left with a model.

    They are freed with the model anyway; this is for whoever needs their memory before. The next call makes new ones.
    """
    _kept.pop(cast("HybridForCausalLM", unwrapped(model)), None)


def kept_decoder(
    model: PreTrainedModel,
    draft: Draft,
    sampling: Sampling,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    num_draft_tokens: DraftCount = 4,
    num_slots: int = 1,
) -> Decoder | OneRun:
    """As :func:`mambify.decode.decoder_for`, for one run: a decoder that an earlier call has left, if there is one.

    One is left behind where graphs are recorded, on a GPU, and its buffers take at most a tenth of the free memory.
    They then hold a power of two of tokens, so that the next prompt, a little longer, fits as well.
    """
    model, draft = unwrapped(model), unwrapped(draft)
    if not _may_keep(model, draft):
        release(model)
        return decoder_for(
            model, draft, sampling, max_length=max_length, stop_ids=stop_ids, num_draft_tokens=num_draft_tokens,
            num_slots=num_slots,
        )  # fmt: skip
    assert isinstance(model, HybridForCausalLM)
    named = weakref.ref(draft, _forget_draft) if isinstance(draft, HybridForCausalLM) else draft
    wanted = _Wanted(named, num_draft_tokens, replace(sampling, seed=None), tuple(stop_ids), num_slots)
    weights = _weights(model), _weights(draft)
    kept = _taken(model, wanted, weights, max_length)
    if kept is None:
        own = cut_if_named(draft, model)
        length = _rounded(model, own, sampling, max_length, num_slots)
        if length is None:  # a large one, which may need the memory of those that are kept
            release(model)
        speculator = Speculator(
            _not_held(model),
            # A cut draft is nobody's but the decoder's.
            own if own is not draft else _not_held(draft),  # type: ignore[arg-type]
            num_slots=num_slots,
            max_length=length or max_length,
            sampling=wanted.sampling,
            num_draft_tokens=num_draft_tokens,
            stop_ids=stop_ids,
        )
        kept = _Kept(wanted, weights, speculator)
        return OneRun(kept, sampling, (model, draft), stays=length is not None)
    return OneRun(kept, sampling, (model, draft), stays=True)


class OneRun:
    """A decoder in the hands of one caller, with whom it holds its models; after the run it is kept again.

    A run that somebody stops listening to must be brought to an end by :meth:`finish`; else the decoder is dropped, as
    after an error.
    """

    def __init__(
        self, kept: _Kept, sampling: Sampling, models: tuple[HybridForCausalLM, Draft], *, stays: bool
    ) -> None:
        self._kept, self._sampling, self._models, self._stays = kept, sampling, models, stays
        self._pieces: Iterator[tuple[int, list[int]]] = iter(())

    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """As :meth:`mambify.engine.Speculator.run`; once."""
        seeds = self._sampling.seeds(len(prompts)) if seeds is None else seeds
        self._pieces = self._kept.speculator.run(prompts, max_new_tokens=max_new_tokens, seeds=seeds)
        return self._hear()

    def dismiss(self, number: int) -> None:
        """As :meth:`mambify.engine.Speculator.dismiss`."""
        self._kept.speculator.dismiss(number)

    def finish(self) -> None:
        """Nothing more of the run is wanted: keeps the decoder for the next call."""
        if self._stays:
            self._stays, self._pieces = False, iter(())
            others = _kept.setdefault(self._models[0], [])
            others.append(self._kept)
            del others[:-_MOST]

    def _hear(self) -> Iterator[tuple[int, list[int]]]:
        yield from self._pieces
        self.finish()


def _may_keep(model: PreTrainedModel, draft: Draft) -> bool:
    """Whether calls record graphs, and whether it can be seen that these are still what the models do."""
    if not isinstance(model, HybridForCausalLM) or not _records(model):
        return False
    if not isinstance(draft, HybridForCausalLM | str | None):
        return False
    models = [model, draft] if isinstance(draft, HybridForCausalLM) else [model]
    return all(_is_known(module) for each in models for module in each.modules())


def _records(model: HybridForCausalLM) -> bool:
    return bool(model.device.type == "cuda")


def _is_known(module: nn.Module) -> bool:
    """Whether nothing but weights decides what a module does: no adapter's switch, no hook but those that look."""
    return not is_hooked(module) and type(module).__module__.startswith(_KNOWN)


def _weights(model: object) -> list[object]:
    """Which modules there are, and where their weights lie: as long as it is the same, buffers made for them serve."""
    if not isinstance(model, HybridForCausalLM):
        return []
    places = ((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in chain(model.parameters(), model.buffers()))
    return [*map(type, model.modules()), *places]


def _taken(model: HybridForCausalLM, wanted: _Wanted, weights: _Weights, max_length: int) -> _Kept | None:
    """A decoder that suits, out of what is kept; those for other weights, and those it would replace, are dropped."""
    found, others = None, []
    for kept in _kept.pop(model, []):
        if kept.wanted != wanted:
            others += [kept] if kept.weights[0] == weights[0] else []
        elif kept.weights == weights and kept.speculator.max_length >= max_length:
            found = kept
    if others:
        _kept[model] = others
    return found


def _rounded(model: HybridForCausalLM, draft: Draft, sampling: Sampling, max_length: int, num_slots: int) -> int | None:
    """What slots should hold so that later calls fit; ``None`` where that is too much to be kept."""
    length = max(_LEAST, 1 << (max_length - 1).bit_length())
    models = [model, draft] if isinstance(draft, HybridForCausalLM) else [model]
    most_new = 1 if draft is None else MOST_DRAFTED + 1
    each = sequence_bytes(models, length=length, most_new=most_new, penalises=sampling.penalises)
    free = free_memory(model.device)
    return length if free is None or num_slots * each <= _SHARE * free else None


Model = TypeVar("Model")


def _not_held(model: Model) -> Model:
    """A model to be used without keeping it alive; names as they are."""
    return cast("Any", weakref.proxy(model)) if isinstance(model, HybridForCausalLM) else model


def _forget_draft(reference: weakref.ref[HybridForCausalLM]) -> None:
    """Drops the decoders of a draft that is gone: they hold its layers."""
    for kept in _kept.values():
        kept[:] = [each for each in kept if each.wanted.draft is not reference]
