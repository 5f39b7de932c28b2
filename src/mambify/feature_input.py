"""Where the residual stream of a draft begins that reads its target's hidden states beside the tokens.

Letters: D hidden size; x any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambify.errors import UnsupportedError
from mambify.norm import RMSNorm


class FeatureInput(nn.Module):
    """W [e ; norm(h)] of a token's embedding e and a hidden state h (after EAGLE, arXiv 2401.15077).

    h is what the token was predicted from: the last hidden state, before the final norm, at the position before it; the
    target's as far as that has read, beyond it the draft's own, and zeros before the first token of a text. W is kept
    as its two halves, so that decoding has a product of one norm and one weight. The embedding has no norm: it is the
    target's, so its length means something already, and the identity leaves it as it is.

    Args:
        norm: of hidden states.
    """

    def __init__(self, hidden_size: int, norm: RMSNorm) -> None:
        super().__init__()
        self.embedding_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = norm
        self.feature_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    @torch.no_grad()
    def start_plain(self) -> None:
        """The identity on embeddings and zero on hidden states: a draft that does not know of them."""
        nn.init.eye_(self.embedding_proj.weight)
        nn.init.zeros_(self.feature_proj.weight)
        for parameter in self.norm.parameters():
            nn.init.ones_(parameter)

    def forward(self, x_xD: Tensor, feature_xD: Tensor | None) -> Tensor:
        """The stream ``[…, D]``, in the dtype of the embeddings ``x_xD``.

        Raises:
            UnsupportedError: no hidden states: whoever runs the model does not know that it is such a draft.
        """
        if feature_xD is None:
            raise UnsupportedError(
                "this is a draft that reads the hidden states of its target, and says nothing by itself: run the "
                "target with --draft and this model"
            )
        normed_xD: Tensor = self.norm(feature_xD.to(x_xD.dtype))
        y_xD: Tensor = self.embedding_proj(x_xD.to(normed_xD.dtype)) + self.feature_proj(normed_xD)
        return y_xD.to(x_xD.dtype)


def shifted(hidden_BTD: Tensor) -> Tensor:
    """Hidden states ``[B, T, D]`` at the position of the token after them: those of whole texts as features."""
    return nn.functional.pad(hidden_BTD[:, :-1], (0, 0, 1, 0))
