"""Which drafted tokens stand, and the token that follows them (Leviathan et al., arXiv 2211.17192, algorithm 1).

A drafted token x is kept with probability min(1, p(x)/q(x)), where p is the target's distribution and q the draft's,
both as they are drawn from: with temperature and cuts applied. At the first one that is not, a token is drawn from what
p has over q, max(p − q, 0); where all are kept, one more from p. What comes out is distributed as the target's own.

Letters: S rows, K drafted tokens, T = K + 1 positions verified, V vocabulary, W words that the draft knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.accept import reference
from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.draw import settings_of

if HAS_TRITON:
    from mambify.ops.accept import triton as kernels

__all__ = ["accept_drafts"]


def accept_drafts(
    target_STV: Tensor,
    draft_SKW: Tensor | None,
    drafted_SK: Tensor,
    uniform_ST: Tensor,
    num_drafted_S: Tensor | None = None,
    *,
    draft_columns_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens of each row are kept, ``[S]`` int64, and the token after them, ``[S]`` int64.

    Args:
        target_STV: the target's logits after the last token before the draft, and after each drafted token.
        draft_SKW: the draft's logits from which each token was drawn, with the same settings; ``None`` where tokens
            were put forward without a distribution (looked up, say): q is then all on the token itself.
        drafted_SK: the tokens; only the first ``num_drafted_S`` of a row count.
        uniform_ST: float32 in [0, 1): one number for each test, and the last for the draw.
        num_drafted_S: 0 to K of each row; ``None`` for K.
        draft_columns_V: of a draft that knows part of the vocabulary, in which of its W columns each word is, int64,
            and -1 for words of which q is exactly zero (:func:`mambify.trimmed_head.columns_of`). ``None``: W = V.
        temperature, top_k, top_p, min_p: see :func:`mambify.ops.draw.draw_tokens`; one number, or one a row.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that do not belong together.
    """
    S, T, V = target_STV.shape
    if draft_SKW is not None:
        known = V if draft_columns_V is None else draft_SKW.shape[-1]
        check_shape("accept_drafts", "draft_SKW", draft_SKW, (S, T - 1, known))
    check_shape("accept_drafts", "draft_columns_V", draft_columns_V, (V,))
    check_shape("accept_drafts", "drafted_SK", drafted_SK, (S, T - 1))
    check_shape("accept_drafts", "uniform_ST", uniform_ST, (S, T))
    check_shape("accept_drafts", "num_drafted_S", num_drafted_S, (S,))
    given = [target_STV] if draft_SKW is None else [target_STV, draft_SKW]
    dtypes = {logits.dtype for logits in given}
    supported = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and all(x.stride(-1) == 1 for x in given)
    chosen = pick_backend("accept_drafts", backend, backends_on(target_STV.device, supported=supported))
    settings = settings_of(temperature, top_k, top_p, min_p, rows=S, device=target_STV.device)
    run = reference.accept_drafts if chosen == "reference" else kernels.accept_drafts
    return run(target_STV, draft_SKW, drafted_SK, uniform_ST, num_drafted_S, draft_columns_V, settings)
