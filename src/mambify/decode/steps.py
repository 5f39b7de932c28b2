"""The loop for models of transformers that are not of this package: one token a step through the model's own cache.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mambify.engine import Sampling
from mambify.engine.speculate import NUMBERS
from mambify.errors import InvalidOptionError
from mambify.ops.draw import draw_tokens, penalise, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepDecoder:
    """What :class:`mambify.engine.Speculator` is to this package's models, without slots, drafts or graphs.

    Args:
        model: a causal language model of transformers' kind.
        stop_ids: tokens that end a row.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, *, stop_ids: Sequence[int]) -> None:
        self.model, self.sampling, self.stop_ids = model, sampling, frozenset(stop_ids)
        self._dismissed: set[int] = set()

    @torch.no_grad()
    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of a prompt, its next token) as they come, stop tokens included; all rows at once.

        The forward pass of a token runs when the one after it is asked for, so stopping early costs nothing.

        Raises:
            InvalidOptionError: an empty prompt, or a wrong number of seeds.
        """
        if not all(map(len, prompts)):
            raise InvalidOptionError("the prompt is empty")
        seeds = self.sampling.seeds(len(prompts)) if seeds is None else seeds
        device, settings = self.model.device, self.sampling.settings()
        if device.type == "meta":  # weights that accelerate brings, as it does what they are applied to
            device = torch.device("cpu")
        width = max(map(len, prompts))
        tokens_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        length_B = torch.tensor([len(ids) for ids in prompts], device=device)
        mask_BT = (torch.arange(width, device=device) >= width - length_B[:, None]).long()
        padded = not bool(mask_BT.all())
        seed_B = torch.tensor(list(seeds), device=device)
        seen_BV = None
        dismissed = self._dismissed = set()  # of this run: another may go on beside it
        active = list(range(len(prompts)))
        cache = None  # the model makes the kind of cache it needs
        for step in range(max_new_tokens):
            if step:
                mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
            output = self.model(
                input_ids=tokens_BT,
                attention_mask=mask_BT if padded else None,
                position_ids=positions_BT if padded else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits_BV = output.past_key_values, output.logits[:, -1]
            if self.sampling.penalises:
                if seen_BV is None:
                    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
                    for row, ids in enumerate(prompts):
                        seen_BV[row, list(ids)] = True
                else:
                    seen_BV.scatter_(1, tokens_BT, True)
                logits_BV = penalise(logits_BV[:, None], seen_BV, penalty=self.sampling.repetition_penalty)[:, 0]
            number_B = uniform(seed_B, (length_B - 1 + step) * NUMBERS)  # the engine's, so that seeds mean the same
            next_B = draw_tokens(logits_BV, number_B, **settings)
            tokens_BT = next_B[:, None]
            for row, token in enumerate(next_B.tolist()):
                if row in active:
                    yield row, [token]
                    if token in self.stop_ids or row in dismissed:
                        active.remove(row)
            if not active:
                return

    def dismiss(self, number: int) -> None:
        """Ends a row of the latest run before its time: to be called between two tokens of :meth:`run`."""
        self._dismissed.add(number)
