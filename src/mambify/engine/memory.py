"""What decoding needs of memory, known before any of it is taken, and what a step reads of it.

Letters: S slots, T tokens read at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mambify.errors import InvalidOptionError
from mambify.machine import free_memory
from mambify.mixers import MIXERS, RecurrentMixer
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.ops.decode_linear import can_pack
from mambify.ops.ring import RingPlace

_USABLE = 0.9  # of the free memory; the rest is for activations and kernels' own buffers
_MOST_PACKED = 0.5  # of the free memory, for weights that are laid out for a CPU's products
_EXACT = 8 * 6  # bytes of a logit on a CPU: float64 weights of both models, sorted and summed


def check_memory(
    models: Sequence[HybridForCausalLM], *, num_slots: int, length: int, most_new: int, penalises: bool = False
) -> None:
    """Whether slots of all ``models`` fit what is free on their device.

    Args:
        models: the target and, where there is one, the draft.
        length: of a slot, in tokens.
        most_new: T.
        penalises: whether the slots keep which tokens occurred.

    Raises:
        InvalidOptionError: they do not; the message names the most that do.
    """
    device = models[0].device
    free = free_memory(device)
    if free is None:
        return

    def needed(length: int) -> int:
        return sequence_bytes(models, length=length, most_new=most_new, penalises=penalises)

    one, usable = needed(length), _usable(models, free)
    if num_slots * one <= usable:
        return
    told = (
        f"{num_slots} sequences of {length} tokens need {num_slots * one / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
        f"free on {device}"
    )
    if one <= usable:
        raise InvalidOptionError(f"{told}: at most {usable // one} of them fit")
    per_token = (one - needed(0)) / length
    fits = int((usable - needed(0)) / per_token) if per_token else 0
    if fits > 0:
        raise InvalidOptionError(f"{told}: one sequence of at most {fits} tokens fits")
    raise InvalidOptionError(f"{told}: not even an empty one fits")


def most_slots(models: Sequence[HybridForCausalLM], *, length: int, most_new: int, free: int) -> int:
    """Slots of ``length`` tokens that :func:`check_memory` lets pass where ``free`` bytes are."""
    return _usable(models, free) // sequence_bytes(models, length=length, most_new=most_new, penalises=False)


def _usable(models: Sequence[HybridForCausalLM], free: int) -> int:
    """Bytes for slots of what is free: the rest is for copies of weights, activations and kernels' own buffers."""
    return int(_USABLE * (free - sum(read_bytes(model) for model in models if packs(model))))


def sequence_bytes(models: Sequence[HybridForCausalLM], *, length: int, most_new: int, penalises: bool) -> int:
    """Bytes of one sequence: its slot in each of ``models``, its history, and what a round makes of it."""
    carried = sum(slot_bytes(model, length=length, most_new=most_new) for model in models)
    return carried + working_bytes(models, most_new=most_new, penalises=penalises) + 8 * length


def packs(model: HybridForCausalLM) -> bool:
    """Whether decoding copies the weights, laid out for a CPU's products: where these exist, and the copy takes no more
    than half of the free memory."""
    if model.config.ops_backend != "auto" or not can_pack(model.device, model.dtype):
        return False
    free = free_memory(model.device)
    return free is None or read_bytes(model) <= _MOST_PACKED * free


def slot_bytes(model: HybridForCausalLM, *, length: int, most_new: int) -> int:
    """Bytes that one slot of the model's layers takes: keys and values, or states with their rings."""
    config, element = model.config, model.dtype.itemsize
    recurrent: dict[type, int] = {}
    total = 0
    for block in model.model.layers:
        assert isinstance(block, HybridBlock)
        mixer = block.mixer
        if not isinstance(mixer, RecurrentMixer):
            total += mixer.state_bytes(config, length + most_new, element)
            continue
        if type(mixer) not in recurrent:  # one slot of one layer, to see what it is
            state = mixer.replay_state(1, RingPlace.empty(1, most_new, device=model.device))
            parts = [state.conv, state.ssm, *(part for part in state.ring if isinstance(part, torch.Tensor))]
            recurrent[type(mixer)] = sum(part.nbytes for part in parts)
        total += recurrent[type(mixer)]
    return total


def working_bytes(models: Sequence[HybridForCausalLM], *, most_new: int, penalises: bool) -> int:
    """Bytes of one slot's logits and of what is made of them in a round."""
    target, *drafts = models
    V, drafted = target.config.vocab_size, most_new - 1
    logits, flags = most_new * V, 2 * V
    for draft in drafts:
        known: int = draft.lm_head.weight.shape[0]
        logits += 2 * drafted * known  # they are stacked
        if known < V:  # and put among all words
            logits, flags = logits + drafted * V, flags + known
    each = target.dtype.itemsize if target.device.type == "cuda" else _EXACT
    if penalises:
        each += 4 + 4 + 1  # penalised, in float32, and which of them
    return logits * each + (flags if penalises else 0)


def read_bytes(model: HybridForCausalLM, *, num_slots: int = 1, length: int = 0) -> int:
    """Bytes that must be read for one token of each slot: all weights but unused embeddings, and what is carried.

    Args:
        length: tokens in each slot.
    """
    config, element = model.config, model.dtype.itemsize
    read = [*model.model.layers.parameters(), model.lm_head.weight]
    if model.model.feature_input is not None:
        read += model.model.feature_input.parameters()
    weights = {id(weight): weight.nbytes for weight in read}
    carried = sum(MIXERS[name].state_bytes(config, length, element) for name in config.layer_mixers or ())
    return sum(weights.values()) + num_slots * carried
