"""KL of a model with one layer's mixer exchanged, for every layer, in half the work of as many forward passes.

The layers below an exchange give what they gave without it. So a batch goes up once, and from every layer a branch goes
on with the other mixer: L + (L - 1) + … + 1 layers instead of L², and one batch of hidden states in memory.

Legend: B rows, T tokens, D hidden size, N blocks of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mambify.mixers import AttentionMixer, Mixer, MixerContext
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.ops.linear_kl import linear_kl

Progress = Callable[[int, int], None]
_IGNORE = -100


@dataclass(frozen=True)
class Swapped:
    """KL(teacher ‖ model) in nats a token.

    Attributes:
        base: of the model without an exchange.
        by_layer: of the model with this one layer exchanged.
        num_tokens: how many were counted.
    """

    base: float
    by_layer: dict[int, float]
    num_tokens: int


@torch.no_grad()
def swapped_divergences(
    teacher: HybridForCausalLM,
    base: Mapping[int, Mixer],
    swaps: Mapping[int, Mixer],
    blocks_NT: Tensor,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Swapped:
    """Measures the teacher with the mixers of ``base`` in its layers, and with one of ``swaps`` in turn.

    Args:
        teacher: attention everywhere; everything beside its mixers serves the model too.
        base: layer → mixer, where it is not the teacher's own.
        swaps: layer → the mixer to exchange for it; one measurement each.
        blocks_NT: token ids; the first token of a row is context only.
        progress: called with (batches done, batches).
    """
    mixers = {index: base.get(index, _block(teacher, index).mixer) for index in range(len(teacher.model.layers))}
    own, sums, count = torch.zeros((), dtype=torch.float64), dict.fromkeys(swaps, 0.0), 0
    batches = blocks_NT.split(batch_size)
    for done, ids_BT in enumerate(batches, start=1):
        ids_BT = ids_BT.to(teacher.device)
        walk = _Walk(teacher, ids_BT)
        start_BTD = teacher.model.embed(ids_BT)
        theirs_BTD = start_BTD
        for index in range(len(mixers)):
            theirs_BTD = walk.layer(theirs_BTD, index, _block(teacher, index).mixer)
        x_BTD = start_BTD
        for index, mixer in mixers.items():
            if index in swaps:
                branch_BTD = walk.layer(x_BTD, index, swaps[index])
                for above in range(index + 1, len(mixers)):
                    branch_BTD = walk.layer(branch_BTD, above, mixers[above])
                sums[index] += walk.divergence(branch_BTD, theirs_BTD)
            x_BTD = walk.layer(x_BTD, index, mixer)
        own += walk.divergence(x_BTD, theirs_BTD)
        count += ids_BT.shape[0] * (ids_BT.shape[1] - 1)
        if progress is not None:
            progress(done, len(batches))
    return Swapped(float(own) / count, {index: total / count for index, total in sums.items()}, count)


class _Walk:
    """One batch on its way through a model's layers, with whichever mixers."""

    def __init__(self, teacher: HybridForCausalLM, ids_BT: Tensor) -> None:
        self.teacher = teacher
        self.labels_M = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=_IGNORE).flatten()
        embedded_BT1 = torch.empty(*ids_BT.shape, 1, device=ids_BT.device, dtype=teacher.dtype)
        self.contexts, _ = teacher.model.layer_contexts(embedded_BT1)

    def layer(self, x_BTD: Tensor, index: int, mixer: Mixer) -> Tensor:
        """The output of layer ``index`` with this mixer in it."""
        block = _block(self.teacher, index)
        context = self.contexts[index] if isinstance(mixer, AttentionMixer) else MixerContext()
        y_BTD, _ = mixer(block.input_layernorm(x_BTD), context, None)
        return block.feed_forward(x_BTD + y_BTD)

    def divergence(self, ours_BTD: Tensor, theirs_BTD: Tensor) -> float:
        """KL(teacher ‖ model) summed over the positions that have a next token."""
        norm, head_VD = self.teacher.model.norm, self.teacher.lm_head.weight
        ours_MD, theirs_MD = norm(ours_BTD).flatten(0, 1), norm(theirs_BTD).flatten(0, 1)
        return float(linear_kl(ours_MD, head_VD, theirs_MD, head_VD, self.labels_M).kl)


def _block(model: HybridForCausalLM, index: int) -> HybridBlock:
    block = model.model.layers[index]
    assert isinstance(block, HybridBlock)
    return block
