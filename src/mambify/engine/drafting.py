"""What a model that drafts does in a round: gives logits for one token after the other, and is told which stood.

Letters: S slots, K drafted tokens, T = K + 1 tokens that the target reads, D hidden size, W words of the draft's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.rounds import take_last, tokens_behind
from mambify.trimmed_head import known_ids


class ModelDraft:
    """A draft that reads tokens alone.

    It is a token behind: the last one that was drafted is read with the token that follows it, if it stands, and not by
    a read of its own that each round would need in case it does.

    Args:
        model: in evaluation mode.
        target: tells which tokens stand.
        history_SL: the texts so far, the slots' last tokens included.
        settings: of its own tower.

    Attributes:
        tower: its slots.
        ids_W: the words that it knows, where that is not all.
    """

    def __init__(self, model: HybridForCausalLM, target: Tower, history_SL: Tensor, **settings: Any) -> None:
        self.tower, self.ids_W = Tower(model, **settings), known_ids(model.lm_head)
        self._target, self._history_SL = target, history_SL
        self._behind_S = target.length_S  # of a round: 0 where there is no token before the last one, else 1

    def begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Reads prompts into slots of target and draft, all but their last tokens into the target's."""
        self._target.begin(slots, [ids[:-1] for ids in prompts])
        self.tower.begin(slots, [ids[:-2] for ids in prompts])

    def logits_after(self, token_S: Tensor, k: int, K: int) -> Tensor:
        """Logits ``[S, 1, W]`` of the k-th of K drafted tokens, from 0 on, given the token before it.

        The last of these reads is not kept: :meth:`settle` says what stands.
        """
        # The token before each slot's last one, too; of a text of one token that one itself.
        read_SX = tokens_behind(self._history_SL, self._target.length_S, -1, 2) if k == 0 else token_S[:, None]
        found_SXW = self.tower.read(read_SX, fold=k == 0)
        if k < K - 1:
            self.tower.keep(read_SX.shape[1], read_SX.shape[1], fold=k == 0)
        return found_SXW[:, -1:]

    def num_drafted(self, K: int) -> Tensor | None:
        """How many of the K tokens count in each slot; ``None`` for all.

        Where there is no token before, as in a text of one token, nonsense was read: for once nothing is drafted, and
        then :meth:`settle` forgets all of it.
        """
        self._behind_S = self._target.length_S.clamp(max=1)
        return self._behind_S * K

    def settle(self, count_S: Tensor, K: int, hidden_STD: Tensor) -> None:
        """After a round, before the target is told: ``count_S`` of the T tokens that it has read stand.

        Args:
            hidden_STD: what the target made of them, before its final norm.
        """
        last = 2 if K == 1 else 1  # tokens of the read that was not kept, of K + 1 in all
        self.tower.keep(count_S + self._behind_S, last, plus=last - (K + 1) - 1, fold=K == 1)

    def take_back(self, K: int) -> None:
        """In place of :meth:`settle`, where the target reads nothing: the K drafted tokens are forgotten."""
        self.tower.keep(-K if K > 1 else 0, 1, fold=K == 1)

    def pretend(self, length: int) -> None:
        """As :meth:`Tower.pretend`, of a target that holds ``length`` tokens."""
        self.tower.pretend(length)

    def rewind(self, length: int) -> None:
        """As :meth:`Tower.rewind`, of a target that holds ``length`` tokens."""
        self.tower.rewind(length)


class FeatureDraft(ModelDraft):
    """A draft that reads the target's hidden states (:class:`mambify.feature_input.FeatureInput`).

    It has read all tokens, the slot's last one too, and keeps its own hidden state after that: the first logits of a
    round. Tokens that it drafts are read with its own hidden states in place of the target's. These reads are taken
    back, and when the target has read the tokens, those that stand are read once more as they should be, all at once.
    So a round is K reads here as well, and nothing is special about texts of one token.
    """

    def __init__(self, model: HybridForCausalLM, target: Tower, history_SL: Tensor, **settings: Any) -> None:
        super().__init__(model, target, history_SL, **settings)
        core, S = model.model, len(history_SL)
        dtype = core.embed_tokens(history_SL[:1, :1]).dtype
        self._after_SD = torch.zeros(S, model.config.hidden_size, dtype=dtype, device=model.device)
        self._own_S1D = self._after_SD[:, None]

    def begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        slot_E = torch.tensor(list(slots), device=self._after_SD.device)
        after_ED = self._target.begin_with(self.tower, slots, prompts)
        self._after_SD[slot_E] = after_ED.to(self._after_SD.dtype)

    def logits_after(self, token_S: Tensor, k: int, K: int) -> Tensor:
        if k == 0:
            self._own_S1D = self._after_SD[:, None]
        else:
            # What is pending before the first of these stands for good; none of these may get into a state.
            self._own_S1D = self.tower.stream(token_S[:, None], self._own_S1D, fold=k == 1)
            kept_before = k - 1
            self.tower.keep(1 if k < K - 1 else -kept_before, 1, fold=k == 1)
        return self.tower.logits(self._own_S1D)

    def num_drafted(self, K: int) -> Tensor | None:
        return None

    def settle(self, count_S: Tensor, K: int, hidden_STD: Tensor) -> None:
        read_ST = tokens_behind(self._history_SL, self._target.length_S, 1, K + 1)
        own_STD = self.tower.stream(read_ST, hidden_STD)
        self.tower.keep(count_S, K + 1)
        take_last(own_STD, count_S, self._after_SD)

    def take_back(self, K: int) -> None:
        pass  # done as they were drafted

    def pretend(self, length: int) -> None:
        self.tower.pretend(length + 1)

    def rewind(self, length: int) -> None:
        self.tower.rewind(length + 1)


def model_draft(model: HybridForCausalLM, target: Tower, history_SL: Tensor, **settings: Any) -> ModelDraft:
    """The draft that ``model`` is."""
    kind = FeatureDraft if model.config.draft_features else ModelDraft
    return kind(model, target, history_SL, **settings)


def require_suitable_draft(target: HybridConfig, draft: HybridConfig) -> None:
    """Raises InvalidOptionError unless a draft has as many tokens as its target, and can read its hidden states if it
    wants to."""
    if draft.vocab_size != target.vocab_size:
        raise InvalidOptionError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens and the target one of {target.vocab_size}: give "
            "a draft of the same vocabulary"
        )
    if draft.draft_features and draft.hidden_size != target.hidden_size:
        raise InvalidOptionError(
            f"the draft reads hidden states of {draft.hidden_size} numbers and the target's have {target.hidden_size}: "
            "give the target that it was trained for, or one made from that"
        )
