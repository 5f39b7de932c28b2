"""Reading prompts into slots, in pieces: whatever their length, memory holds one piece's activations.

Attention writes keys and values where they stay and looks at them there; recurrent layers carry their state from piece
to piece. Prompts that begin together are read together as far as the shortest goes, then without it: nothing is
padded, and each row's tokens see what they see alone.

Letters: S slots, E rows read together, T tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mambify.mixers import MixerContext, RecurrentState, ReplayState
from mambify.mixers.attention import PrefixKV, SlotKV
from mambify.model import HybridBlock, HybridForCausalLM

_PIECE = 2048  # tokens read at once, all rows together

State = SlotKV | ReplayState | RecurrentState


def read_prompts(
    model: HybridForCausalLM,
    states: Sequence[State],
    slots: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    piece: int = _PIECE,
) -> None:
    """Fills ``slots`` with what the model's layers carry after the prompts; after an empty one that is nothing.

    Args:
        states: one a layer.
        piece: the most tokens read at once.
    """
    blocks = [block for block in model.model.layers if isinstance(block, HybridBlock)]
    order = sorted(range(len(slots)), key=lambda row: len(prompts[row]))
    while order:
        count = max(piece // max(len(prompts[order[-1]]), 1), 1)
        order, together = order[:-count], order[-count:]
        _read_together(model, blocks, states, [slots[r] for r in together], [prompts[r] for r in together], piece)


def _read_together(
    model: HybridForCausalLM,
    blocks: Sequence[HybridBlock],
    states: Sequence[State],
    slots: Sequence[int],
    prompts: Sequence[Sequence[int]],
    piece: int,
) -> None:
    """As :func:`read_prompts`, of prompts that get longer from one to the next."""
    device = model.device
    carried: list[RecurrentState | None] = [None] * len(blocks)
    lengths = sorted({len(prompt) for prompt in prompts} | {0})
    done = sum(not prompt for prompt in prompts)
    _put_down(states, carried, slots, rows=done)
    carried = _without(carried, done)
    for begin, end in pairwise(lengths):
        going = list(slots)[done:]
        ids_ET = torch.tensor([list(prompt[begin:end]) for prompt in prompts[done:]], device=device)
        step = max(piece // len(going), 1)
        for start in range(begin, end, step):
            part_ET = ids_ET[:, start - begin : start - begin + step]
            carried = _read(model, blocks, states, carried, going, part_ET, start)
        ended = sum(len(prompt) == end for prompt in prompts)
        _put_down(states, carried, going, rows=ended)
        carried = _without(carried, ended)
        done += ended


def _read(
    model: HybridForCausalLM,
    blocks: Sequence[HybridBlock],
    states: Sequence[State],
    carried: Sequence[RecurrentState | None],
    slots: Sequence[int],
    ids_ET: Tensor,
    start: int,
) -> list[RecurrentState | None]:
    """One piece, from place ``start`` on; returns what recurrent layers carry after it."""
    core = model.model
    x_ETD = core.embed_tokens(ids_ET)
    position_1T = start + torch.arange(ids_ET.shape[1], device=ids_ET.device)[None]
    with_positions = MixerContext(position_embeddings=core.rotary_emb(x_ETD, position_1T))
    rows = _rows(slots, ids_ET.device)
    after: list[RecurrentState | None] = []
    for block, state, before in zip(blocks, states, carried, strict=True):
        normed_ETD = block.input_layernorm(x_ETD)
        if isinstance(state, SlotKV):
            prefix = PrefixKV(state.keys_SGLP, state.values_SGLP, rows, start)
            y_ETD, _ = block.mixer(normed_ETD, with_positions, prefix)
            after.append(None)
        else:
            y_ETD, own = block.mixer(normed_ETD, MixerContext(), before)
            after.append(own)
        x_ETD = block.feed_forward(x_ETD + y_ETD)
    return after


def _put_down(
    states: Sequence[State], carried: Sequence[RecurrentState | None], slots: Sequence[int], *, rows: int
) -> None:
    """Leaves what the first ``rows`` rows carry in their slots."""
    if not rows:
        return
    for state, after in zip(states, carried, strict=True):
        if isinstance(state, SlotKV):
            continue
        slot_E = torch.tensor(list(slots[:rows]), device=state.ssm.device)
        if after is None:
            state.conv[slot_E] = 0
            state.ssm[slot_E] = 0
        elif isinstance(state, ReplayState):
            state.load(slot_E, after.first(rows))
        else:
            state.conv[slot_E] = after.conv[:rows].to(state.conv.dtype)
            state.ssm[slot_E] = after.ssm[:rows].to(state.ssm.dtype)


def _without(carried: Sequence[RecurrentState | None], rows: int) -> list[RecurrentState | None]:
    """What is carried by all but the first ``rows`` rows."""
    return [None if state is None else RecurrentState(state.conv[rows:], state.ssm[rows:]) for state in carried]


def _rows(slots: Sequence[int], device: torch.device) -> slice | Tensor:
    """The slots as a slice where they stand side by side, so that indexing copies nothing."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))
    return torch.tensor(list(slots), device=device)
