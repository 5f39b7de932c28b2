"""A mixer as the matrix it multiplies each head's values with: row i says what position i takes from each before it.

Softmax attention and the state-space duality form of Mamba2 (arXiv 2405.21060) both have one, ``[T, T]`` for each head,
so one can be held against the other (arXiv 2408.10189).

Legend: B batch, T (also S) tokens, D hidden size, H query heads, G key/value heads, P head dimension, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.mixers.attention import AttentionMixer
from mambify.mixers.base import MixerContext
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.ops.causal_conv import causal_conv
from mambify.ops.rope import rotate


def attention_matrix(mixer: AttentionMixer, x_BTD: Tensor, context: MixerContext) -> Tensor:
    """softmax(q kᵀ / √P) of whole rows of one document each, ``[B, H, T, T]`` in float32.

    Args:
        x_BTD: what the mixer reads.
        context: its RoPE; the mask is made here, causal and as wide as the layer's window.
    """
    B, T, _ = x_BTD.shape
    assert context.position_embeddings is not None
    q_BTHP = mixer.q_norm(mixer.q_proj(x_BTD).view(B, T, -1, mixer.head_dim))
    k_BTGP = mixer.k_norm(mixer.k_proj(x_BTD).view(B, T, -1, mixer.head_dim))
    q_BHTP = rotate(q_BTHP, *context.position_embeddings).transpose(1, 2)
    k_BGTP = rotate(k_BTGP, *context.position_embeddings).transpose(1, 2)
    k_BHTP = k_BGTP.repeat_interleave(mixer.attend.num_key_value_groups, dim=1)
    scores_BHTS = (q_BHTP @ k_BHTP.transpose(-1, -2)).float() * mixer.attend.scaling
    behind_TS = _distance(T, x_BTD.device)
    window = mixer.attend.sliding_window
    hidden_TS = behind_TS < 0 if window is None else (behind_TS < 0) | (behind_TS >= window)
    matrix_BHTS: Tensor = scores_BHTS.masked_fill(hidden_TS, -torch.inf).softmax(-1)
    return matrix_BHTS


def ssd_matrix(mixer: Mamba2Mixer, x_BTD: Tensor) -> Tensor:
    """M[i, j] = C_iᵀ B_j · exp(Σ_{j<k≤i} Δ_k A) · Δ_j, and D more on the diagonal: ``[B, H, T, T]`` in float32.

    It is what takes each head's values, after the convolution, to what the gate and the norm read.
    """
    T = x_BTD.shape[1]
    inner = mixer.num_heads * mixer.head_dim
    _, xBC_BTC, dt_BTH = mixer.in_proj(x_BTD).split([inner, sum(mixer.conv_split), mixer.num_heads], dim=-1)
    xBC_BTC, _ = causal_conv(xBC_BTC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, backend=mixer.ops_backend)
    _, B_BTC, C_BTC = xBC_BTC.split(mixer.conv_split, dim=-1)
    B_BGTN = B_BTC.unflatten(-1, (mixer.num_groups, mixer.state_size)).transpose(1, 2)
    C_BHTN = C_BTC.unflatten(-1, (mixer.num_heads, mixer.state_size)).transpose(1, 2)
    B_BHTN = B_BGTN.repeat_interleave(mixer.num_heads // mixer.num_groups, dim=1)
    dt_BHT = F.softplus(dt_BTH.float() + mixer.dt_bias.float()).transpose(1, 2)
    decay_BHT = (dt_BHT * -mixer.A_log.float().exp()[:, None]).cumsum(-1)
    ahead_TS = _distance(T, x_BTD.device) < 0
    # masked before exp: above the diagonal the exponent is positive and may overflow
    decay_BHTS = (decay_BHT[..., :, None] - decay_BHT[..., None, :]).masked_fill(ahead_TS, -torch.inf).exp()
    matrix_BHTS: Tensor = (C_BHTN @ B_BHTN.transpose(-1, -2)).float() * decay_BHTS * dt_BHT[..., None, :]
    return matrix_BHTS + mixer.D.float()[:, None, None] * torch.eye(T, device=x_BTD.device)


def _distance(num_tokens: int, device: torch.device) -> Tensor:
    """i − j of each row i and column j, ``[T, T]``."""
    index_T = torch.arange(num_tokens, device=device)
    return index_T[:, None] - index_T
