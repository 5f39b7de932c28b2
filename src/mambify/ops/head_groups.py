"""Which heads of x, B and C the heads of a Mamba2 state read: consecutive ones share.

Letters: H heads of the state, G heads of x, U of B, V of C.
"""

from __future__ import annotations

from torch import Tensor


def check_head_groups(operation: str, heads: int, **shared: int) -> None:
    """Raises ValueError unless each of the counts divides ``heads``; names the first that does not by its letter."""
    for letter, count in shared.items():
        if count < 1 or heads % count:
            raise ValueError(f"{operation}: needs {letter} dividing H, got {letter}={count}, H={heads}")


def is_key_value(heads: int, G: int, U: int, V: int) -> bool:
    """Whether x and B come by the same key/value heads and C by query heads, as attention leaves them."""
    return G == U and heads == V


def as_key_values(x: Tensor, B: Tensor, C: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, B and C, heads on the last axis but one, so that :func:`is_key_value`: repeated where they are not."""
    if is_key_value(heads, x.shape[-2], B.shape[-2], C.shape[-2]):
        return x, B, C
    by_head_x, by_head_B, by_head_C = (v.repeat_interleave(heads // v.shape[-2], dim=-2) for v in (x, B, C))
    return by_head_x, by_head_B, by_head_C
