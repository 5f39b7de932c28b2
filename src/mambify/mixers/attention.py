"""Softmax attention as the teacher has it: grouped queries, RoPE, optional biases, q/k norm, sliding window.

Legend: B batch, T tokens, D hidden size, H query heads, G key/value heads, P head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from mambify.mixers.base import AttentionWeights, Mixer, MixerContext
from mambify.norm import RMSNorm
from mambify.ops.decode_attention import decode_attention
from mambify.ops.rope import rotate

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from mambify.config import HybridConfig


class KVState(NamedTuple):
    """Keys and values so far: one layer of a transformers cache, which grows as tokens come."""

    cache: Cache
    layer_idx: int

    def append(self, k_BGTP: Tensor, v_BGTP: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new keys and values; returns all that the new queries may look at."""
        keys, values = self.cache.update(k_BGTP, v_BGTP, self.layer_idx)
        return keys, values


class SlotKV(NamedTuple):
    """Keys and values in fixed buffers, a slot a sequence, each filled up to its own length.

    Attributes:
        keys_SGLP, values_SGLP: the buffers; S slots, L their length.
        lengths_S: tokens each slot holds already; the next goes to this place.
    """

    keys_SGLP: Tensor
    values_SGLP: Tensor
    lengths_S: Tensor

    def first(self, slots: int) -> SlotKV:
        """The first slots, as views."""
        return SlotKV(*(part[:slots] for part in self))

    def append(self, k_STGP: Tensor, v_STGP: Tensor) -> None:
        """Writes T tokens into every slot, from its own place on."""
        slots, tokens = k_STGP.shape[:2]
        slot_S1 = torch.arange(slots, device=k_STGP.device)[:, None]
        place_ST = self.lengths_S[:, None] + torch.arange(tokens, device=k_STGP.device)
        self.keys_SGLP[slot_S1, :, place_ST] = k_STGP
        self.values_SGLP[slot_S1, :, place_ST] = v_STGP


class PrefixKV(NamedTuple):
    """Rows of slots' buffers into which several tokens of a prompt are read, all rows from one place on.

    Attributes:
        keys_SGLP, values_SGLP: the buffers.
        rows: which slots.
        start: tokens these hold already.
    """

    keys_SGLP: Tensor
    values_SGLP: Tensor
    rows: slice | Tensor
    start: int

    def append(self, k_ETGP: Tensor, v_ETGP: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values; returns all up to them, ``[E, G, n, P]``."""
        end = self.start + k_ETGP.shape[1]
        self.keys_SGLP[self.rows, :, self.start : end] = k_ETGP.transpose(1, 2).to(self.keys_SGLP.dtype)
        self.values_SGLP[self.rows, :, self.start : end] = v_ETGP.transpose(1, 2).to(self.values_SGLP.dtype)
        return self.keys_SGLP[self.rows, :, :end], self.values_SGLP[self.rows, :, :end]


class SoftmaxAttention(nn.Module):
    """softmax(q kᵀ / √P) v through transformers' attention backends; returns (output, weights or None)."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim and config.num_key_value_heads and config.layer_types
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

    def forward(
        self,
        q_BHTP: Tensor,
        k_BGSP: Tensor,
        v_BGSP: Tensor,
        attention_mask: Tensor | None,
        attention_kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``[B, T, H, P]`` and, with the eager backend, the weights ``[B, H, T, S]``."""
        backend = self.config._attn_implementation
        one_token = q_BHTP.shape[2] == 1 and q_BHTP.device.type == "cpu"
        if one_token and backend == "sdpa" and not torch.is_grad_enabled():
            return single_query_attention(q_BHTP, k_BGSP, v_BGSP, attention_mask, self.scaling), None
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        y_BTHP, weights = attend(
            self,
            q_BHTP,
            k_BGSP,
            v_BGSP,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **attention_kwargs,
        )
        return y_BTHP, weights


def single_query_attention(
    q_BHTP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """softmax(scaling · q kᵀ) v for one token a row, as two grouped matrix products; returns ``[B, 1, H, P]``.

    torch's CPU kernel packs keys and values into tiles, which pays for itself over many queries. For a single one it is
    most of a decoding step: in bfloat16 ten to twenty times the time of this.

    Args:
        attention_mask: boolean, true where a key may be seen, or added to the scores; broadcast over heads.
    """
    B, H, _, P = q_BHTP.shape
    G = k_BGSP.shape[1]
    scores_BGRS = (q_BHTP.reshape(B, G, H // G, P) @ k_BGSP.transpose(-1, -2)).float() * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BGRS = scores_BGRS.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores_BGRS = scores_BGRS + attention_mask
    y_BGRP = scores_BGRS.softmax(-1).to(v_BGSP.dtype) @ v_BGSP
    return y_BGRP.reshape(B, 1, H, P)


_SCORES = 2**24  # of a head, with a mask that must be written out: 64 MB of it in float32


def prefix_attention(
    q_EHTP: Tensor, keys_EGnP: Tensor, values_EGnP: Tensor, *, scaling: float, window: int | None
) -> Tensor:
    """softmax(scaling · q kᵀ) v of the last T of n tokens, each over those up to its own; returns ``[E, T, H, P]``.

    Args:
        window: a query sees only the last ``window`` tokens up to its own; ``None`` for all.
    """
    T, n = q_EHTP.shape[2], keys_EGnP.shape[2]
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": q_EHTP.shape[1] != keys_EGnP.shape[1]}
    attend = nn.functional.scaled_dot_product_attention
    whole = window is None or n <= window
    if n == T and whole:
        return attend(q_EHTP, keys_EGnP, values_EGnP, is_causal=True, **settings).transpose(1, 2)
    if whole and q_EHTP.device.type == "cuda" and q_EHTP.dtype in (torch.bfloat16, torch.float16):
        mask: Any = causal_lower_right(T, n)
        return attend(q_EHTP, keys_EGnP, values_EGnP, attn_mask=mask, **settings).transpose(1, 2)
    found = []
    step = max(_SCORES // n, 1)
    for first in range(0, T, step):
        last = min(first + step, T)
        end = n - T + last
        begin = 0 if window is None else max(0, n - T + first + 1 - window)
        query_Q1 = torch.arange(n - T + first, end, device=q_EHTP.device)[:, None]
        key_n = torch.arange(begin, end, device=q_EHTP.device)
        sees_Qn = key_n <= query_Q1
        if window is not None:
            sees_Qn &= key_n > query_Q1 - window
        keys, values = keys_EGnP[:, :, begin:end], values_EGnP[:, :, begin:end]
        found.append(attend(q_EHTP[:, :, first:last], keys, values, attn_mask=sees_Qn, **settings))
    return torch.cat(found, 2).transpose(1, 2)


class AttentionMixer(Mixer):
    """The teacher's own attention layer; parameters under transformers' names."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.head_dim and config.num_key_value_heads
        D, P = config.hidden_size, config.head_dim
        self.head_dim = P
        bias = config.attention_bias
        self.q_proj = nn.Linear(D, config.num_attention_heads * P, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * P, D, bias=config.attention_output_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(P, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(P, eps=config.rms_norm_eps)
        self.attend = SoftmaxAttention(config, layer_idx)

    def forward(
        self, x_BTD: Tensor, context: MixerContext, state: KVState | SlotKV | PrefixKV | None = None
    ) -> tuple[Tensor, KVState | SlotKV | PrefixKV | None]:
        """Attends from every token to those before it. Returns ``[B, T, D]`` and the (grown) state.

        With slots the caller counts the lengths on.
        """
        B, T, _ = x_BTD.shape
        q_BTHP = self.q_norm(self.q_proj(x_BTD).view(B, T, -1, self.head_dim))
        k_BTGP = self.k_norm(self.k_proj(x_BTD).view(B, T, -1, self.head_dim))
        v_BTGP = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        assert context.position_embeddings is not None, "attention needs RoPE's cos and sin"
        q_BTHP = rotate(q_BTHP, *context.position_embeddings)
        k_BTGP = rotate(k_BTGP, *context.position_embeddings)
        if isinstance(state, SlotKV):
            state.append(k_BTGP, v_BTGP)
            y_STHP = decode_attention(
                q_BTHP,
                state.keys_SGLP,
                state.values_SGLP,
                state.lengths_S,
                more=T,
                scaling=self.attend.scaling,
                window=self.attend.sliding_window,
            )
            return self.o_proj(y_STHP.reshape(B, T, -1)), state
        if isinstance(state, PrefixKV):
            keys, values = state.append(k_BTGP, v_BTGP)
            scaling, window = self.attend.scaling, self.attend.sliding_window
            y_BTHP = prefix_attention(q_BTHP.transpose(1, 2), keys, values, scaling=scaling, window=window)
            return self.o_proj(y_BTHP.reshape(B, T, -1)), state
        q_BHTP, k_BGTP, v_BGTP = (x.transpose(1, 2) for x in (q_BTHP, k_BTGP, v_BTGP))
        if state is not None:
            k_BGTP, v_BGTP = state.append(k_BGTP, v_BGTP)
        y_BTHP, _ = self.attend(q_BHTP, k_BGTP, v_BGTP, context.attention_mask, context.attention_kwargs)
        return self.o_proj(y_BTHP.reshape(B, T, -1)), state

    def load_state(self, cache: Cache) -> KVState:
        return KVState(cache, self.layer_idx)

    def store_state(self, cache: Cache, state: KVState) -> None:
        """Nothing to do: appending already wrote into the cache."""

    def weights(self) -> AttentionWeights:
        """This layer's parameters as a replacement mixer is built from them."""
        return AttentionWeights(
            q=self.q_proj.weight,
            k=self.k_proj.weight,
            v=self.v_proj.weight,
            o=self.o_proj.weight,
            q_bias=self.q_proj.bias,
            k_bias=self.k_proj.bias,
            v_bias=self.v_proj.bias,
            o_bias=self.o_proj.bias,
            q_norm=getattr(self.q_norm, "weight", None),
            k_norm=getattr(self.k_norm, "weight", None),
        )

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        assert config.num_key_value_heads and config.head_dim
        return 2 * num_tokens * config.num_key_value_heads * config.head_dim * element_size
