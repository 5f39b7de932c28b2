"""The one cache transformers does not have: for a model without any attention layer."""

from __future__ import annotations

from transformers.cache_utils import DynamicCache


class RecurrentCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache of linear-attention layers only, which counts the tokens it has seen.

    ``generate`` asks every cache for its length; transformers' own reads it off an attention layer and raises
    where there is none.
    """

    num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.num_seen

    def reset(self) -> None:
        super().reset()
        self.num_seen = 0
