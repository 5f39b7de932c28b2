"""The weights as GGUF has them: llama.cpp's names, its layout of a Mamba2 layer, its order of rotary pairs.

Legend: D hidden size, H query heads, G key/value heads, P head dimension, N state size, K conv width; see ``layout``
for the heads, copies and state of the file. ``[out, in]`` as torch has it: GGUF lists dimensions the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.export.gguf.layout import MambaLayout, needs_idle_block
from mambify.mixers.attention import AttentionMixer
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.model import HybridBlock, HybridForCausalLM

Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, made only when it is asked for.

    Attributes:
        name: in the file.
        source: the parameter it is made of.
        form: what is done to that; ordinary tensor operations, so that the shape is known without doing it.
        exact: whether it stays float32 in a quantised file.
    """

    name: str
    source: Tensor
    form: Form
    exact: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch has it, slowest dimension first."""
        return tuple(self.form(self.source.detach().to("meta")).shape)

    def value(self) -> Tensor:
        """The values, float32, on the CPU."""
        return self.form(self.source.detach().to("cpu", torch.float32)).contiguous()


def gguf_tensors(model: HybridForCausalLM, layout: MambaLayout | None) -> Iterator[GgufTensor]:
    """Every tensor of the file, in its order.

    Args:
        layout: of the Mamba2 layers; ``None`` where there are none.
    """
    stack = model.model
    yield _matrix("token_embd.weight", stack.embed_tokens.weight)
    if not model.config.tie_word_embeddings:
        yield _matrix("output.weight", model.lm_head.weight)
    yield _vector("output_norm.weight", stack.norm.weight)
    factors = rope_factors(model)
    if factors is not None:
        yield _vector("rope_freqs.weight", factors)
    for index, block in enumerate(stack.layers):
        assert isinstance(block, HybridBlock)
        prefix = f"blk.{index}"
        yield _vector(f"{prefix}.attn_norm.weight", block.input_layernorm.weight)
        if isinstance(block.mixer, AttentionMixer):
            yield from _attention(prefix, block.mixer)
        else:
            assert isinstance(block.mixer, Mamba2Mixer) and layout is not None
            yield from _mamba2(prefix, block.mixer, layout)
        assert block.post_attention_layernorm is not None
        yield _vector(f"{prefix}.ffn_norm.weight", block.post_attention_layernorm.weight)
        for name in ("gate", "up", "down"):
            projection = getattr(block.mlp, f"{name}_proj")
            yield _matrix(f"{prefix}.ffn_{name}.weight", projection.weight)
            if projection.bias is not None:
                yield _vector(f"{prefix}.ffn_{name}.bias", projection.bias)
    if needs_idle_block(model.config):
        yield from _idle_block(f"blk.{len(stack.layers)}", model.config)


def _idle_block(prefix: str, config: HybridConfig) -> Iterator[GgufTensor]:
    """A block that adds zero to what passes it."""
    assert config.head_dim
    D, queries, F = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    zero, one = torch.zeros(()), torch.ones(())
    for name, shape in (
        ("attn_q", (queries, D)),
        ("attn_k", (config.head_dim, D)),
        ("attn_v", (config.head_dim, D)),
        ("attn_output", (D, queries)),
        ("ffn_gate", (F, D)),
        ("ffn_up", (F, D)),
        ("ffn_down", (D, F)),
    ):
        yield _matrix(f"{prefix}.{name}.weight", zero.expand(shape))
    for name in ("attn_norm", "ffn_norm"):
        yield _vector(f"{prefix}.{name}.weight", one.expand(D))


def rope_factors(model: HybridForCausalLM) -> Tensor | None:
    """What each RoPE frequency is divided by, ``[P/2]``; ``None`` where RoPE is not scaled.

    Taken from the frequencies that the model itself computes with, so every scaling that does not change with the
    length of the text is carried the same way.
    """
    parameters = model.config.rope_parameters or {}
    if parameters.get("rope_type", "default") == "default":
        return None
    frequencies = model.model.rotary_emb.inv_freq.detach().double().cpu()
    exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float64) / (2 * len(frequencies))
    factors: Tensor = parameters["rope_theta"] ** -exponents / frequencies
    return factors.float()


def interleave_rotary_halves(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k with a head's two rotary halves one after the other (Hugging Face) → pair by pair (llama.cpp)."""
    halves: Tensor = rows.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


def _attention(prefix: str, mixer: AttentionMixer) -> Iterator[GgufTensor]:
    for letter in ("q", "k", "v"):
        projection = getattr(mixer, f"{letter}_proj")
        heads = projection.out_features // mixer.head_dim

        def form(rows: Tensor, heads: int = heads, rotated: bool = letter != "v") -> Tensor:
            return interleave_rotary_halves(rows, heads) if rotated else rows

        yield GgufTensor(f"{prefix}.attn_{letter}.weight", projection.weight, form, exact=False)
        if projection.bias is not None:
            yield GgufTensor(f"{prefix}.attn_{letter}.bias", projection.bias, form, exact=True)
    yield _matrix(f"{prefix}.attn_output.weight", mixer.o_proj.weight)
    if mixer.o_proj.bias is not None:
        yield _vector(f"{prefix}.attn_output.bias", mixer.o_proj.bias)


def _mamba2(prefix: str, mixer: Mamba2Mixer, layout: MambaLayout) -> Iterator[GgufTensor]:
    def in_proj(weight: Tensor) -> Tensor:
        z, xBC, dt = weight.split([layout.num_heads * layout.head_dim, sum(mixer.conv_split), layout.num_heads], dim=0)
        return torch.cat([_channels(z, layout), _conv_channels(xBC, mixer, layout), _per_head(dt, layout)])

    def conv(rows: Tensor) -> Tensor:
        return _conv_channels(rows, mixer, layout)

    def scalars(values: Tensor, fill: float) -> Tensor:
        return _per_head(values, layout, fill)[:, None]

    def out_proj(weight: Tensor) -> Tensor:
        """Columns that read the first copy of each head, zeros for the other copies and heads."""
        columns = weight.unflatten(1, (layout.num_heads, layout.head_dim))
        padded = weight.new_zeros(len(weight), layout.heads, layout.copies, layout.head_dim)
        padded[:, : layout.num_heads, 0] = columns
        return padded.flatten(1)

    def named(name: str, source: Tensor, form: Form, *, exact: bool = True) -> GgufTensor:
        return GgufTensor(f"{prefix}.{name}", source, form, exact)

    assert mixer.conv1d.bias is not None
    yield named("ssm_in.weight", mixer.in_proj.weight, in_proj, exact=False)
    yield named("ssm_conv1d.weight", mixer.conv1d.weight, lambda weight: conv(weight.squeeze(1)))
    yield named("ssm_conv1d.bias", mixer.conv1d.bias, conv)
    yield named("ssm_dt.bias", mixer.dt_bias, lambda values: _per_head(values, layout))
    # any decay below 0 does for a head whose state is zero
    yield named("ssm_a", mixer.A_log, lambda values: scalars(-values.exp(), fill=-1.0))
    yield named("ssm_d", mixer.D, lambda values: scalars(values, fill=0.0))
    yield named("ssm_norm.weight", mixer.norm.weight, lambda values: _channels(values, layout).view(layout.heads, -1))
    yield named("ssm_out.weight", mixer.out_proj.weight, out_proj, exact=False)


def _conv_channels(rows: Tensor, mixer: Mamba2Mixer, layout: MambaLayout) -> Tensor:
    """Rows ``[x | B | C]`` of G·P, G·N, H·N → of the file's 2·D, heads·state, heads·state."""
    x, B, C = rows.split(mixer.conv_split, dim=0)
    shared = layout.num_heads // layout.num_kv_heads
    x = x.unflatten(0, (layout.num_kv_heads, layout.head_dim)).repeat_interleave(shared, dim=0).flatten(0, 1)
    B = B.unflatten(0, (layout.num_kv_heads, layout.state_size)).repeat_interleave(shared, dim=0)
    C = C.unflatten(0, (layout.num_heads, layout.state_size))
    return torch.cat([_channels(x, layout), _states(B, layout), _states(C, layout)])


def _channels(rows: Tensor, layout: MambaLayout) -> Tensor:
    """Rows of H·P channels → every head's copies one after the other, then the zero heads."""
    heads = rows.unflatten(0, (layout.num_heads, 1, layout.head_dim)).repeat_interleave(layout.copies, dim=1)
    return _per_head(heads.flatten(1, 2), layout).flatten(0, 1)


def _states(heads: Tensor, layout: MambaLayout) -> Tensor:
    """``[H, N, ...]`` → rows of heads·state, zero where nothing of ours is."""
    padded = heads.new_zeros(layout.heads, layout.state, *heads.shape[2:])
    padded[: layout.num_heads, : layout.state_size] = heads
    return padded.flatten(0, 1)


def _per_head(heads: Tensor, layout: MambaLayout, fill: float = 0.0) -> Tensor:
    """``[H, ...]`` → ``[heads, ...]``, ``fill`` in the zero heads."""
    padded = heads.new_full((layout.heads, *heads.shape[1:]), fill)
    padded[: layout.num_heads] = heads
    return padded


def _matrix(name: str, source: Tensor) -> GgufTensor:
    return GgufTensor(name, source, lambda weight: weight, exact=False)


def _vector(name: str, source: Tensor) -> GgufTensor:
    return GgufTensor(name, source, lambda weight: weight, exact=True)
