"""Drawing one token a row from logits, given one uniform number a row.

Letters: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.draw import reference
from mambify.ops.draw.penalty import penalise
from mambify.ops.draw.settings import Settings, settings_of
from mambify.ops.draw.uniform import uniform

if HAS_TRITON:
    from mambify.ops.draw import triton as kernels

__all__ = ["Settings", "draw_tokens", "penalise", "settings_of", "uniform"]


def draw_tokens(
    logits_SV: Tensor,
    uniform_S: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The token at which the cumulative distribution passes the row's uniform number, ``[S]`` int64.

    The distribution is softmax(logits / temperature), cut to the ``top_k`` likeliest tokens, then to the smallest set
    that holds ``top_p`` of what is left, then to tokens at least ``min_p`` times as likely as the likeliest. Tokens as
    likely as the last one kept are kept too, as transformers' warpers do. Each setting is one number, or one a row
    (``[S]``): rows of one batch may draw in different ways.

    Args:
        uniform_S: float32 in [0, 1).
        temperature: 0 takes the likeliest token (the first of several).
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    check_shape("draw_tokens", "uniform_S", uniform_S, tuple(logits_SV.shape[:1]))
    supported = logits_SV.dtype in (torch.float32, torch.bfloat16) and logits_SV.stride(-1) == 1
    chosen = pick_backend("draw_tokens", backend, backends_on(logits_SV.device, supported=supported))
    if not isinstance(temperature, Tensor) and temperature == 0.0:
        return logits_SV.argmax(-1)
    settings = settings_of(temperature, top_k, top_p, min_p, rows=len(logits_SV), device=logits_SV.device)
    run = reference.draw_tokens if chosen == "reference" else kernels.draw_tokens
    return run(logits_SV, uniform_S, settings)
