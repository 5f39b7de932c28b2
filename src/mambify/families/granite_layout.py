"""How a hybrid of ours lies in the stock GraniteMoeHybrid architecture: sizes, weights there and back.

Stock code knows one count of state-space groups for x, B and C, a mixer as wide as a whole multiple of the hidden size,
one attention head size that is hidden size over heads, and one matrix for the MLP's gate and up. So going there,

    x and B of a key/value head are repeated for each of its query heads
    heads of zeros fill the mixer up to that multiple: their x is 0, so is what the norm and out_proj make of it
    a head may be cut into several that share its group: some kernels want a multiple of 8 heads
    attention heads that are too small are filled with zeros, each rotary half for itself
    a model without attention gets a last layer of zeros that has it: stock caches read their length off one

and coming back, each of these is undone after a check that it is what was done. Values are copied, never computed, so
the way there and back is exact to the bit.

Legend: D hidden size, H query heads, G key/value heads, P head dimension, M heads of the stock mixer (≥ H),
Q head dimension of the stock attention (≥ P).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mambify.config import HybridConfig
from mambify.errors import CheckpointError

_PER_HEAD = ("dt_bias", "A_log", "D")

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class GraniteLayout:
    """The sizes on both sides.

    Attributes:
        hidden_size, num_heads, num_groups, head_dim: D, H, G, P of our model.
        own_attention_bias, own_output_bias: whether our q, k, v and our output projections have biases.
        stock_heads: M, heads (and groups) of the stock mixer, those of zeros included, before they are cut.
        split: into how many stock heads each of them is cut.
        attention_heads, attention_groups: of the stock attention.
        attention_bias: whether the stock attention has biases; those that ours lacks are zeros.
        mixer_bias: whether the stock mixer's projections have biases; in_proj's is zeros.
        conv_bias: whether the stock convolution has one; ours always has.
        inert_layers: layers of zeros at the end.
    """

    hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    own_attention_bias: bool
    own_output_bias: bool
    stock_heads: int
    attention_heads: int
    attention_groups: int
    attention_bias: bool
    mixer_bias: bool
    split: int = 1
    conv_bias: bool = True
    inert_layers: int = 0

    @classmethod
    def of(cls, config: HybridConfig, *, split: int = 1) -> GraniteLayout:
        """The layout in which a model of ours is written."""
        assert config.head_dim and config.num_key_value_heads
        D, H, P = config.hidden_size, config.num_attention_heads, config.head_dim
        multiple = next(e for e in range(1, H * P + P + 1) if e * D >= H * P and e * D % P == 0)
        kept = bool(config.attention_layers)
        # The attention of a layer that does nothing may have any heads: those most like the others.
        heads = H if kept else min((h for h in range(1, D) if D % (2 * h) == 0), key=lambda h: abs(D // h - P))
        return cls(
            hidden_size=D,
            num_heads=H,
            num_groups=config.num_key_value_heads,
            head_dim=P,
            own_attention_bias=config.attention_bias,
            own_output_bias=config.attention_output_bias,
            stock_heads=multiple * D // P,
            attention_heads=heads,
            attention_groups=config.num_key_value_heads if kept else 1,
            attention_bias=kept and (config.attention_bias or config.attention_output_bias),
            mixer_bias=config.attention_output_bias,
            split=split,
            inert_layers=0 if kept else 1,
        )

    @property
    def attention_dim(self) -> int:
        """Q: engines do not read it, they divide."""
        return self.hidden_size // self.attention_heads

    # From one of our parameters, by name in its module, to the stock ones.

    def fold_mamba2(self, name: str, tensor: Tensor) -> Named:
        """Of our Mamba2 mixer → of the stock one."""
        H, G, P = self.num_heads, self.num_groups, self.head_dim
        if name == "in_proj.weight":
            z, x, B, C, dt = tensor.split([H * P, G * P, G * P, H * P, H])
            yield name, torch.cat([self._pad(z, P), self._repeat(x), self._repeat(B), self._pad(C, P), self._cut(dt)])
            if self.mixer_bias:
                yield "in_proj.bias", tensor.new_zeros(self.stock_heads * (4 * P + self.split))
        elif name in ("conv1d.weight", "conv1d.bias"):
            x, B, C = tensor.split([G * P, G * P, H * P])
            yield name, torch.cat([self._repeat(x), self._repeat(B), self._pad(C, P)])
        elif name in _PER_HEAD:
            yield name, self._cut(tensor)
        elif name == "norm.weight":
            yield name, self._pad(tensor, P)
        elif name == "out_proj.weight":
            yield name, self._pad(tensor.T, P).T
        else:
            assert name == "out_proj.bias" and self.mixer_bias, name
            yield name, tensor

    def fold_attention(self, name: str, tensor: Tensor) -> Named:
        """Of our attention → of the stock one."""
        module, _, kind = name.partition(".")
        if name == "o_proj.weight":
            yield name, self._widen(tensor.T, rotary=False).T
            if self.attention_bias and not self.own_output_bias:
                yield "o_proj.bias", tensor.new_zeros(len(tensor))
        elif name == "o_proj.bias":
            yield name, tensor
        else:
            wide = self._widen(tensor, rotary=module != "v_proj")
            yield name, wide
            if kind == "weight" and self.attention_bias and not self.own_attention_bias:
                yield f"{module}.bias", tensor.new_zeros(len(wide))

    def inert_layer(self, like: Tensor, feed_forward: int) -> Named:
        """Of a stock attention layer that adds 0 to what it reads."""
        D, keys = self.hidden_size, self.attention_groups * self.attention_dim
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield norm, like.new_ones(D)
        for name, rows in (("q_proj", D), ("k_proj", keys), ("v_proj", keys), ("o_proj", D)):
            yield f"self_attn.{name}.weight", like.new_zeros(rows, D)
        yield "shared_mlp.input_linear.weight", like.new_zeros(2 * feed_forward, D)
        yield "shared_mlp.output_linear.weight", like.new_zeros(D, feed_forward)

    def _pad(self, rows: Tensor, rows_per_head: int) -> Tensor:
        """Zeros for the heads that ours lacks."""
        missing = (self.stock_heads - self.num_heads) * rows_per_head
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    def _cut(self, values: Tensor) -> Tensor:
        """What there is one of for each head, for each head of the stock mixer."""
        return self._pad(values, 1).repeat_interleave(self.split, 0)

    def _repeat(self, rows: Tensor) -> Tensor:
        """The rows of each key/value head, once for each of its query heads."""
        heads = rows.unflatten(0, (self.num_groups, self.head_dim))
        return self._pad(heads.repeat_interleave(self.num_heads // self.num_groups, 0).flatten(0, 1), self.head_dim)

    def _widen(self, rows: Tensor, *, rotary: bool) -> Tensor:
        """Zeros at the end of each head, or of each half of a head where RoPE pairs the halves."""
        parts = 2 if rotary else 1
        missing = (self.attention_dim - self.head_dim) // parts
        if not missing:
            return rows
        split = rows.unflatten(0, (-1, self.head_dim // parts))
        return functional.pad(split, (0, 0) * (rows.dim() - 1) + (0, missing)).flatten(0, 1)

    # From one stock parameter, by name in its module, to ours.

    def unfold_mamba2(self, name: str, tensor: Tensor) -> Named:
        """Of the stock mixer → of our Mamba2.

        Raises:
            CheckpointError: ours cannot hold its values.
        """
        P, wide = self.head_dim, self.stock_heads * self.head_dim
        if name == "in_proj.weight":
            z, x, B, C, dt = tensor.split([wide, wide, wide, wide, self.stock_heads * self.split])
            own = [self._unpad(z, P), self._first(x), self._first(B), self._unpad(C, P), self._join(dt)]
            yield name, torch.cat(own)
        elif name in ("conv1d.weight", "conv1d.bias"):
            x, B, C = tensor.split([wide, wide, wide])
            own_rows = torch.cat([self._first(x), self._first(B), self._unpad(C, P)])
            yield name, own_rows
            if not self.conv_bias:
                yield "conv1d.bias", own_rows.new_zeros(len(own_rows))
        elif name in _PER_HEAD:
            yield name, self._join(tensor)
        elif name == "norm.weight":
            yield name, self._unpad(tensor, P)
        elif name == "out_proj.weight":
            yield name, self._unpad(tensor.T, P).T.contiguous()
            if self.own_output_bias and not self.mixer_bias:
                yield "out_proj.bias", tensor.new_zeros(len(tensor))
        elif name == "out_proj.bias" and self.own_output_bias:
            yield name, tensor
        else:  # in_proj.bias, or an output bias of zeros
            require_zeros(tensor, "a bias of the mixer that ours has not")

    def unfold_attention(self, name: str, tensor: Tensor) -> Named:
        """Of the stock attention → of ours.

        Raises:
            CheckpointError: ours cannot hold its values.
        """
        module, _, kind = name.partition(".")
        if name == "o_proj.weight":
            yield name, self._narrow(tensor.T, rotary=False).T.contiguous()
            if self.own_output_bias and not self.attention_bias:
                yield "o_proj.bias", tensor.new_zeros(len(tensor))
        elif name == "o_proj.bias" and self.own_output_bias:
            yield name, tensor
        elif module != "o_proj" and (kind == "weight" or self.own_attention_bias):
            yield name, self._narrow(tensor, rotary=module != "v_proj")
        else:
            require_zeros(tensor, "a bias of the attention that ours has not")

    def _unpad(self, rows: Tensor, rows_per_head: int) -> Tensor:
        own = self.num_heads * rows_per_head
        require_zeros(rows[own:], "heads that fill the mixer up")
        filled: Tensor = rows[:own]
        return filled

    def _join(self, values: Tensor) -> Tensor:
        parts = values.unflatten(0, (self.stock_heads, self.split))
        if not torch.equal(parts, parts[:, :1].expand_as(parts)):
            raise CheckpointError("heads of one group differ in Δ, A or D; mambify's Mamba2 has one head a group")
        return self._unpad(parts[:, 0], 1)

    def _first(self, rows: Tensor) -> Tensor:
        heads = self._unpad(rows, self.head_dim).unflatten(0, (self.num_groups, -1, self.head_dim))
        if not torch.equal(heads, heads[:, :1].expand_as(heads)):
            raise CheckpointError(
                f"x and B of the Mamba layers differ between heads that would share one of {self.num_groups} "
                "key/value heads; mambify has one count for attention and Mamba"
            )
        first: Tensor = heads[:, 0].flatten(0, 1)
        return first

    def _narrow(self, rows: Tensor, *, rotary: bool) -> Tensor:
        parts = 2 if rotary else 1
        split = rows.unflatten(0, (-1, self.attention_dim // parts))
        own = self.head_dim // parts
        require_zeros(split[:, own:], "what fills the attention's heads up")
        narrow: Tensor = split[:, :own].flatten(0, 1)
        return narrow


def require_zeros(tensor: Tensor, what: str) -> None:
    """Raises CheckpointError unless all of ``tensor`` is zero."""
    if tensor.count_nonzero():
        raise CheckpointError(f"{what} should be zero and is not: this model cannot be read as a hybrid of mambify")
