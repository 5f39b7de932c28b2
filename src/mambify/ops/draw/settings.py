"""How each row draws: the settings of :func:`mambify.ops.draw.draw_tokens` as tensors, one number a row.

Letters: S rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambify.ops.backends import check_shape


class Settings(NamedTuple):
    """Float32 but for ``top_k_S``, which is int32; all on the logits' device."""

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor

    def named(self) -> dict[str, Tensor]:
        """As keyword arguments of :func:`mambify.ops.draw.draw_tokens`."""
        return {name.removesuffix("_S"): value for name, value in self._asdict().items()}


def settings_of(
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    *,
    rows: int,
    device: torch.device,
) -> Settings:
    """One number a row of each, of numbers or of tensors ``[S]``.

    Raises:
        ValueError: a tensor of another shape.
    """

    def row(name: str, value: float | Tensor, dtype: torch.dtype) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.full((rows,), value, dtype=dtype, device=device)
        check_shape("settings_of", name, value, (rows,))
        return value.to(device=device, dtype=dtype)

    return Settings(
        row("temperature", temperature, torch.float32),
        row("top_k", top_k, torch.int32),
        row("top_p", top_p, torch.float32),
        row("min_p", min_p, torch.float32),
    )
