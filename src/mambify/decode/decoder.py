"""The loop that suits a model: what users give, put into the terms of the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mambify.decode.adapters import unwrapped
from mambify.decode.drafts import cut_if_named, is_made_of_target
from mambify.decode.steps import StepDecoder
from mambify.engine import DraftCount, Sampling, Speculator
from mambify.engine.placement import is_spread, require_one_place
from mambify.errors import UnsupportedError
from mambify.mixers import RecurrentMixer
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mambify.decode.drafts import Draft

log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Continues prompts and hands out tokens as they come; see :meth:`mambify.engine.Speculator.run`."""

    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of a prompt, its next tokens), stop tokens included."""
        ...

    def dismiss(self, number: int) -> None:
        """Ends a prompt of the present run before its time."""
        ...


def decoder_for(
    model: PreTrainedModel,
    draft: Draft,
    sampling: Sampling,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    num_draft_tokens: DraftCount = 4,
    num_slots: int = 1,
) -> Decoder:
    """The engine for models of this package, with a draft or without; plain steps for any other of transformers', and
    for models whose weights are not all on one device.

    Raises:
        InvalidOptionError: a number of draft tokens out of range, a draft of another vocabulary, too little memory.
        UnsupportedError: a draft, and it or the model is not one of this package's, or not on one device.
    """
    model = unwrapped(model)
    if draft is None and not isinstance(model, HybridForCausalLM):
        return StepDecoder(model, sampling, stop_ids=stop_ids)
    if draft is None and is_spread(model):
        _require_recurrent_layers_at_hand(model)
        log.warning("the model's weights are spread by a device_map: it decodes step by step, not in the engine")
        return StepDecoder(model, sampling, stop_ids=stop_ids)
    return speculator(
        model,
        draft,
        sampling,
        max_length=max_length,
        stop_ids=stop_ids,
        num_draft_tokens=num_draft_tokens,
        num_slots=num_slots,
    )


def speculator(
    target: PreTrainedModel,
    draft: Draft,
    sampling: Sampling,
    *,
    max_length: int,
    stop_ids: Sequence[int],
    num_draft_tokens: DraftCount = 4,
    num_slots: int = 1,
) -> Speculator:
    """Buffers and, on a GPU, recorded rounds for ``num_slots`` sequences; to be kept where many prompts follow.

    Args:
        draft: a smaller model of the same vocabulary; ``"lookup"``: what followed the last tokens earlier on;
            ``"cut:2"``: two layers of the target itself, the first and the last; ``None`` for plain decoding.
        num_draft_tokens: 1 to 16, a range of such numbers, or ``"auto"``: see :class:`mambify.engine.Speculator`.
        max_length: the most tokens of a sequence, prompt included.

    Raises:
        InvalidOptionError: a number of draft tokens out of range, a draft of another vocabulary, too little memory.
        UnsupportedError: target or draft is not one of this package's models, or not on one device.
    """
    target, draft = unwrapped(target), unwrapped(draft)
    for role, model in (("target", target), ("draft", draft)):
        if isinstance(model, HybridForCausalLM) or (role == "draft" and (model is None or is_made_of_target(model))):
            continue
        raise UnsupportedError(
            f"speculation needs a {role} of this package, not a {type(model).__name__}: load it with mambify.load"
        )
    assert isinstance(target, HybridForCausalLM)
    require_one_place(target)
    return Speculator(
        target,
        cut_if_named(draft, target),  # type: ignore[arg-type]
        num_slots=num_slots,
        max_length=max_length,
        sampling=sampling,
        num_draft_tokens=num_draft_tokens,
        stop_ids=stop_ids,
    )


def _require_recurrent_layers_at_hand(model: HybridForCausalLM) -> None:
    """They read weights of their modules without calling these, and only a call makes accelerate bring them."""
    mixers = (module for module in model.modules() if isinstance(module, RecurrentMixer))
    if any(parameter.is_meta for mixer in mixers for parameter in mixer.parameters()):
        raise UnsupportedError(
            "recurrent layers cannot be offloaded, only attention: keep them on a device in the device_map, or load "
            "the model with mambify.load"
        )
