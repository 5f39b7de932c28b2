"""Reading prompts into slots, in pieces: whatever their length, memory holds one piece's activations.

Attention writes keys and values where they stay and looks at them there; recurrent layers carry their state from piece
to piece. Prompts that begin together are read together as far as the shortest goes, then without it: nothing is
padded, and each row's tokens see what they see alone.

Letters: S slots, E rows read together, T tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mambify.mixers import MixerContext, RecurrentState, ReplayState
from mambify.mixers.attention import PrefixKV, SlotKV
from mambify.model import HybridBlock, HybridForCausalLM

_PIECE = 2048  # tokens read at once, all rows together

State = SlotKV | ReplayState | RecurrentState
#: a model and what its layers keep
Reads = tuple[HybridForCausalLM, Sequence[State]]


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
    for together in _groups(prompts, piece):
        rows = _Rows(model, states, [slots[row] for row in together])
        _read_together(rows, [prompts[row] for row in together], piece)


def read_prompts_ahead(
    target: Reads, draft: Reads, slots: Sequence[int], prompts: Sequence[Sequence[int]], *, piece: int = _PIECE
) -> Tensor:
    """Has a target read prompts but for their last tokens, and a draft that reads its hidden states whole ones.

    Returns:
        The draft's hidden states after the prompts, ``[E, D]``.
    """
    shorter = [prompt[:-1] for prompt in prompts]
    after: dict[int, Tensor] = {}
    for together in _groups(shorter, piece):
        theirs = [slots[row] for row in together]
        ahead = _Ahead(_Rows(*draft, theirs), [prompts[row] for row in together])
        _read_together(_Rows(*target, theirs), [shorter[row] for row in together], piece, ahead)
        after |= ahead.after
    return torch.stack([after[slot] for slot in slots])


def _groups(prompts: Sequence[Sequence[int]], piece: int) -> Iterator[list[int]]:
    """Which prompts are read together, the shortest of a group first."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    while order:
        count = max(piece // max(len(prompts[order[-1]]), 1), 1)
        order, together = order[:-count], order[-count:]
        yield together


class _Rows:
    """Slots of one model that are read into together; those that are ready first stand first."""

    def __init__(self, model: HybridForCausalLM, states: Sequence[State], slots: Sequence[int]) -> None:
        self.model, self._states, self.slots = model, states, list(slots)
        self._blocks = [block for block in model.model.layers if isinstance(block, HybridBlock)]
        self._carried: list[RecurrentState | None] = [None] * len(self._blocks)

    def read(self, ids_ET: Tensor, start: int, features_ETD: Tensor | None = None) -> Tensor:
        """One piece, from place ``start`` on; its hidden states ``[E, T, D]``."""
        self._carried, x_ETD = _read(
            self.model, self._blocks, self._states, self._carried, self.slots, ids_ET, start, features_ETD
        )
        return x_ETD

    def end(self, rows: int) -> None:
        """The first ``rows`` of them are ready."""
        _put_down(self._states, self._carried, self.slots, rows=rows)
        self._carried = _without(self._carried, rows)
        del self.slots[:rows]


class _Ahead:
    """A draft that reads each token with its target's hidden state at the place before, as these come.

    Attributes:
        after: slot → the draft's own hidden state ``[D]`` after the prompt.
    """

    def __init__(self, rows: _Rows, prompts: Sequence[Sequence[int]]) -> None:
        self._rows, self._prompts, self.after = rows, list(prompts), dict[int, Tensor]()
        first_E1 = torch.tensor([prompt[:1] for prompt in self._prompts], device=rows.model.device)
        nothing_E1D = torch.zeros(*first_E1.shape, rows.model.config.hidden_size, device=rows.model.device)
        self._last_ED = rows.read(first_E1, 0, nothing_E1D)[:, -1]

    def follow(self, hidden_ETD: Tensor, start: int) -> None:
        """The target has read a piece from place ``start`` on."""
        begin, end = start + 1, start + 1 + hidden_ETD.shape[1]
        ids_ET = torch.tensor([list(prompt[begin:end]) for prompt in self._prompts], device=hidden_ETD.device)
        self._last_ED = self._rows.read(ids_ET, begin, hidden_ETD)[:, -1]

    def end(self, rows: int) -> None:
        """As :meth:`_Rows.end`."""
        self.after |= zip(self._rows.slots[:rows], self._last_ED, strict=False)
        self._rows.end(rows)
        self._last_ED = self._last_ED[rows:]
        del self._prompts[:rows]


def _read_together(rows: _Rows, prompts: Sequence[Sequence[int]], piece: int, ahead: _Ahead | None = None) -> None:
    """As :func:`read_prompts`, of prompts that get longer from one to the next."""
    both: list[_Rows | _Ahead] = [rows] if ahead is None else [rows, ahead]
    lengths = sorted({len(prompt) for prompt in prompts} | {0})
    done = sum(not prompt for prompt in prompts)
    for each in both:
        each.end(done)
    for begin, end in pairwise(lengths):
        ids_ET = torch.tensor([list(prompt[begin:end]) for prompt in prompts[done:]], device=rows.model.device)
        step = max(piece // len(ids_ET), 1)
        for start in range(begin, end, step):
            hidden_ETD = rows.read(ids_ET[:, start - begin : start - begin + step], start)
            if ahead is not None:
                ahead.follow(hidden_ETD, start)
        ended = sum(len(prompt) == end for prompt in prompts)
        for each in both:
            each.end(ended)
        done += ended


def _read(
    model: HybridForCausalLM,
    blocks: Sequence[HybridBlock],
    states: Sequence[State],
    carried: Sequence[RecurrentState | None],
    slots: Sequence[int],
    ids_ET: Tensor,
    start: int,
    features_ETD: Tensor | None,
) -> tuple[list[RecurrentState | None], Tensor]:
    """One piece, from place ``start`` on: what recurrent layers carry after it, and its hidden states."""
    core = model.model
    x_ETD = core.embed(ids_ET, features_ETD)
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
    return after, x_ETD


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
