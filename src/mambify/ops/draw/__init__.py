"""Drawing one token a row from logits, given one uniform number a row.

Letters: S rows, V vocabulary or the part of it that there are logits of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.draw import reference
from mambify.ops.draw.penalty import penalise
from mambify.ops.draw.settings import Settings, settings_of
from mambify.ops.draw.uniform import uniform, uniforms

if HAS_TRITON:
    from mambify.ops.draw import triton as kernels

__all__ = ["Settings", "draw_tokens", "penalise", "settings_of", "uniform", "uniforms"]


def draw_tokens(
    logits_SV: Tensor,
    uniform_S: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    ids_V: Tensor | None = None,
    out_S: Tensor | None = None,
    copy_SV: Tensor | None = None,
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
        ids_V: the tokens that the logits are of, int64; ``None`` for all, in order.
        out_S: int64, where to put the tokens; they may lie apart.
        copy_SV: where to put the logits as well, in their dtype; rows may lie apart.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    check_shape("draw_tokens", "uniform_S", uniform_S, tuple(logits_SV.shape[:1]))
    supported = logits_SV.dtype in (torch.float32, torch.bfloat16) and logits_SV.stride(-1) == 1
    chosen = pick_backend("draw_tokens", backend, backends_on(logits_SV.device, supported=supported))
    check_shape("draw_tokens", "ids_V", ids_V, tuple(logits_SV.shape[1:]))
    check_shape("draw_tokens", "out_S", out_S, tuple(logits_SV.shape[:1]))
    check_shape("draw_tokens", "copy_SV", copy_SV, tuple(logits_SV.shape))
    settings = settings_of(temperature, top_k, top_p, min_p, rows=len(logits_SV), device=logits_SV.device)
    if chosen == "triton":
        return kernels.draw_tokens(logits_SV, uniform_S, settings, ids_V, out_S, copy_SV)
    if copy_SV is not None:
        copy_SV.copy_(logits_SV)
    token_S = reference.draw_tokens(logits_SV, uniform_S, settings)
    token_S = token_S if ids_V is None else ids_V[token_S]
    return token_S if out_S is None else out_S.copy_(token_S)
