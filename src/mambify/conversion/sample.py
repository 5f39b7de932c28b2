"""What one attention layer does on calibration text: what initialisations that are measured start from.

Legend: B rows, T tokens, D hidden size, H query heads, G key/value heads, P head dimension, J = P/2 rotated pairs,
L lags (distance back, 0 for the token itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mambify.mixers import AttentionMixer, MixerContext
from mambify.model import MixerTrace
from mambify.ops.rope import rotate


class AttentionSample(NamedTuple):
    """One attention layer on calibration text, in float32.

    Attributes:
        input_BTD: the normed hidden states it read.
        heads_BTHP: what each head gave, before the output projection.
        output_BTD: what the layer gave.
        lags_HL: share of a head's attention that goes so many tokens back; sums to 1. The first token of a row is left
            out: attention rests on it where there is nothing to look at, however far back it is.
        cos_LJ, sin_LJ: of RoPE's angle between two tokens at that lag.
    """

    input_BTD: Tensor
    heads_BTHP: Tensor
    output_BTD: Tensor
    lags_HL: Tensor
    cos_LJ: Tensor
    sin_LJ: Tensor

    @property
    def half_distance_H(self) -> Tensor:
        """The least distance, the token itself at 1, within which half of a head's attention falls."""
        return (self.lags_HL.cumsum(-1) < 0.5).sum(-1) + 1.0


@torch.no_grad()
def sample_attention(attention: AttentionMixer, traces: Sequence[MixerTrace], context: MixerContext) -> AttentionSample:
    """Looks at the layer again, at its weights of every pair of tokens, a row at a time.

    Args:
        traces: of this layer, of whole rows of one length.
        context: what the layer knew; positions count from 0.
    """
    rows_BTD = torch.cat([trace.input_BTD for trace in traces])
    assert context.position_embeddings is not None
    cos_1TP, sin_1TP = (part[:1] for part in context.position_embeddings)
    T = rows_BTD.shape[1]
    total_HL = torch.zeros(attention.attend.config.num_attention_heads, T, device=rows_BTD.device)
    heads = []
    for row_TD in rows_BTD:
        weights_HTS, heads_THP = _attend(attention, row_TD[None], cos_1TP, sin_1TP)
        heads.append(heads_THP)
        weights_HTS[..., 0] = 0.0
        total_HL += _sum_by_lag(weights_HTS)
    pairs = cos_1TP.shape[-1] // 2
    scale = cos_1TP[0, 0, 0].float()  # YaRN scales both, which turns nothing
    return AttentionSample(
        input_BTD=rows_BTD.float(),
        heads_BTHP=torch.stack(heads),
        output_BTD=torch.cat([trace.output_BTD for trace in traces]).float(),
        lags_HL=total_HL / total_HL.sum(-1, keepdim=True).clamp(min=1e-12),
        cos_LJ=cos_1TP[0, :, :pairs].float() / scale,
        sin_LJ=sin_1TP[0, :, :pairs].float() / scale,
    )


def _sum_by_lag(weights_HTS: Tensor) -> Tensor:
    """Sums ``[H, L]`` over the pairs of tokens that are equally far apart; in a fixed order, on a GPU too.

    Turned round and cut into rows that are one shorter, row t moves t to the right: each column then is one lag.
    """
    H, T, _ = weights_HTS.shape
    turned = torch.nn.functional.pad(weights_HTS.flip(-1), (0, T)).flatten(1)
    return turned[:, :-T].view(H, T, 2 * T - 1).sum(1)[:, T - 1 :]


def _attend(attention: AttentionMixer, x_1TD: Tensor, cos_1TP: Tensor, sin_1TP: Tensor) -> tuple[Tensor, Tensor]:
    """The weights ``[H, T, S]`` of every token on those before it, and what each head gave ``[T, H, P]``."""
    P, T = attention.head_dim, x_1TD.shape[1]
    q_1THP = attention.q_norm(attention.q_proj(x_1TD).unflatten(-1, (-1, P)))
    k_1TGP = attention.k_norm(attention.k_proj(x_1TD).unflatten(-1, (-1, P)))
    q_HTP = rotate(q_1THP, cos_1TP, sin_1TP)[0].transpose(0, 1).float()
    k_GTP = rotate(k_1TGP, cos_1TP, sin_1TP)[0].transpose(0, 1).float()
    v_GTP = attention.v_proj(x_1TD).unflatten(-1, (-1, P))[0].transpose(0, 1).float()
    repeats = attention.attend.num_key_value_groups
    k_HTP, v_HTP = (part.repeat_interleave(repeats, 0) for part in (k_GTP, v_GTP))
    allowed_TS = torch.ones(T, T, dtype=torch.bool, device=x_1TD.device).tril()
    if attention.attend.sliding_window is not None:
        allowed_TS = allowed_TS.triu(1 - attention.attend.sliding_window)
    scores_HTS = (q_HTP @ k_HTP.transpose(-1, -2)) * attention.attend.scaling
    weights_HTS = scores_HTS.masked_fill(~allowed_TS, -torch.inf).softmax(-1)
    return weights_HTS, (weights_HTS @ v_HTP).transpose(0, 1)
