"""An output head that knows part of the vocabulary: what a draft needs, whose rare words would be refused anyway.

Letters: D hidden size, V vocabulary, W the words that are known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrimmedHead(nn.Linear):
    """Logits of W words; all others have minus infinity, which is a probability of exactly zero.

    Attributes:
        weight: ``[W, D]``.
        token_ids: the known words in rising order, int64 ``[W]``; stored beside the weight.
    """

    token_ids: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, num_known: int) -> None:
        super().__init__(hidden_size, num_known, bias=False)
        self.vocab_size = vocab_size
        self.register_buffer("token_ids", torch.zeros(num_known, dtype=torch.long))

    def known(self, x_xD: Tensor) -> Tensor:
        """Logits ``[…, W]`` of the known words alone."""
        return super().forward(x_xD)

    def forward(self, x_xD: Tensor) -> Tensor:
        """Logits ``[…, V]``."""
        return scatter_logits(self.known(x_xD), self.token_ids, self.vocab_size)

    @classmethod
    def of(cls, head: nn.Linear, token_ids_W: Tensor) -> TrimmedHead:
        """The rows ``token_ids_W`` of a whole head, as a copy in its dtype and place."""
        with torch.device("meta"):
            trimmed = cls(head.in_features, head.out_features, len(token_ids_W))
        trimmed.weight = nn.Parameter(head.weight.detach()[token_ids_W.to(head.weight.device)].clone())
        trimmed.token_ids = token_ids_W.to(head.weight.device)
        return trimmed

    def rows_of(self, head: nn.Linear) -> nn.Linear:
        """``head`` with these words only: this very head where the numbers are the same."""
        other = TrimmedHead.of(head, self.token_ids)
        same = other.weight.shape == self.weight.shape and other.weight.dtype == self.weight.dtype
        return self if same and torch.equal(other.weight, self.weight) else other.requires_grad_(False)


def scatter_logits(known_xW: Tensor, token_ids_W: Tensor, vocab_size: int) -> Tensor:
    """``[…, V]`` of ``[…, W]``: minus infinity at the words that are not among ``token_ids_W``."""
    whole_xV = known_xW.new_full((*known_xW.shape[:-1], vocab_size), -torch.inf)
    return whole_xV.index_copy_(-1, token_ids_W, known_xW)


def columns_of(token_ids_W: Tensor, vocab_size: int) -> Tensor:
    """Of each word its place among ``token_ids_W``, ``[V]`` int64; -1 where it is not among them."""
    column_V = token_ids_W.new_full((vocab_size,), -1)
    return column_V.index_copy_(0, token_ids_W, torch.arange(len(token_ids_W), device=token_ids_W.device))


def known_ids(head: nn.Module) -> Tensor | None:
    """The words that ``head`` knows, ``[W]``; ``None`` for all."""
    return head.token_ids if isinstance(head, TrimmedHead) else None


def known_logits(head: nn.Module, x_xD: Tensor) -> Tensor:
    """Logits of the words that ``head`` knows: ``[…, W]`` of a trimmed one, else ``[…, V]``."""
    logits: Tensor = head.known(x_xD) if isinstance(head, TrimmedHead) else head(x_xD)
    return logits
