"""How a hybrid of ours lies in the stock GraniteMoeHybrid architecture: sizes, weights there and back.

Stock code knows one state-space group count for x, B and C, a mixer width that is a whole multiple of the hidden size,
one attention head size that is hidden size over heads, and one matrix for the MLP's gate and up. So going there,

    x and B of a key/value head are repeated for each of its query heads
    heads of zeros fill the mixer up to that multiple: their x is 0, so is what the norm and out_proj make of it
    attention heads that are too small are filled with zeros, each rotary half for itself
    gate and up are stacked
    a model without attention gets a last layer of zeros that has it: stock caches read their length off one

and coming back, each of these is undone after a check that it is what was done. Values are copied, never computed, so
the way there and back is exact to the bit.

Legend: D hidden size, H query heads, G key/value heads, P head dimension, M heads of the stock mixer (≥ H),
Q head dimension of the stock attention (≥ P).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_PER_HEAD = ("dt_bias", "A_log", "D")


@dataclass(frozen=True)
class GraniteLayout:
    """The sizes on both sides.

    Attributes:
        num_heads, num_groups, head_dim: H, G, P of our mixers.
        stock_heads: M, heads of the stock mixer, those of zeros included.
        attention_heads, attention_groups: of the stock attention.
        hidden_size: D.
        inert_layers: layers of zeros at the end.
        attention_bias: whether the stock attention has biases; those that ours lacks are zeros.
        mixer_bias: whether the stock mixer's projections have biases; in_proj's is zeros.
        own_output_bias: whether our output projections have one.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    stock_heads: int
    attention_heads: int
    attention_groups: int
    hidden_size: int
    inert_layers: int
    attention_bias: bool
    mixer_bias: bool
    own_output_bias: bool

    @property
    def attention_dim(self) -> int:
        """Q: engines do not read it, they divide."""
        return self.hidden_size // self.attention_heads

    def fold_mamba2(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of our Mamba2 mixer by name → those of the stock one."""
        H, G, P = self.num_heads, self.num_groups, self.head_dim
        z, x, B, C, dt = weights["in_proj.weight"].split([H * P, G * P, G * P, H * P, H])
        yield "in_proj.weight", torch.cat([*self._widen(z, x, B, C), self._pad(dt, 1)])
        for name in ("conv1d.weight", "conv1d.bias"):
            x, B, C = weights[name].split([G * P, G * P, H * P])
            yield name, torch.cat(self._widen(None, x, B, C))
        for name in _PER_HEAD:
            yield name, self._pad(weights[name], 1)
        yield "norm.weight", self._pad(weights["norm.weight"], P)
        yield "out_proj.weight", self._pad(weights["out_proj.weight"].T, P).T
        if self.mixer_bias:
            in_proj = weights["in_proj.weight"]
            yield "in_proj.bias", in_proj.new_zeros(4 * self.stock_heads * P + self.stock_heads)
            yield "out_proj.bias", weights["out_proj.bias"]

    def _widen(self, z: Tensor | None, x: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        P = self.head_dim
        repeated = [rows.unflatten(0, (self.num_groups, P)) for rows in (x, B)]
        repeated = [rows.repeat_interleave(self.num_heads // self.num_groups, 0).flatten(0, 1) for rows in repeated]
        return [self._pad(rows, P) for rows in (*([] if z is None else [z]), *repeated, C)]

    def _pad(self, rows: Tensor, rows_per_head: int) -> Tensor:
        """Zeros for the heads that ours lacks."""
        missing = (self.stock_heads - self.num_heads) * rows_per_head
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def fold_attention(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of our attention by name → those of the stock one."""
        for name in ("q_proj", "k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in weights:
                    yield f"{name}.{kind}", self._widen_heads(weights[f"{name}.{kind}"], rotary=name != "v_proj")
        output = weights["o_proj.weight"]
        yield "o_proj.weight", self._widen_heads(output.T, rotary=False).T
        if self.attention_bias:
            for name, heads in (("q_proj", self.num_heads), ("k_proj", self.num_groups), ("v_proj", self.num_groups)):
                if f"{name}.bias" not in weights:
                    yield f"{name}.bias", output.new_zeros(heads * self.attention_dim)
            yield "o_proj.bias", weights.get("o_proj.bias", output.new_zeros(output.shape[0]))

    def _widen_heads(self, rows: Tensor, *, rotary: bool) -> Tensor:
        """Zeros at the end of each head, or of each half of a head where RoPE pairs the halves."""
        parts = 2 if rotary else 1
        missing = (self.attention_dim - self.head_dim) // parts
        if not missing:
            return rows
        split = rows.unflatten(0, (-1, self.head_dim // parts))
        return functional.pad(split, (0, 0) * (rows.dim() - 1) + (0, missing)).flatten(0, 1)

    def inert_layer(self, like: Tensor, feed_forward: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a stock attention layer that adds 0 to what it reads, by their names in the layer."""
        D, keys = self.hidden_size, self.attention_groups * self.attention_dim
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield norm, like.new_ones(D)
        for name, rows in (("q_proj", D), ("k_proj", keys), ("v_proj", keys), ("o_proj", D)):
            yield f"self_attn.{name}.weight", like.new_zeros(rows, D)
        yield "shared_mlp.input_linear.weight", like.new_zeros(2 * feed_forward, D)
        yield "shared_mlp.output_linear.weight", like.new_zeros(D, feed_forward)
