"""A model's step over fixed buffers in few kernels, on the modules' own parameters.

Reading a token is reading every weight once; what a layer does between its products costs a launch each time it is a
kernel of its own. For up to sixteen rows (S·T; eight in float32) a layer is

    Mamba2     norm + in_proj | conv, Δ, state, gated norm | out_proj + sum | norm + gate, up, SiLU | down + sum
    Mamba1     norm + in_proj | conv, dt_proj, state, gate | out_proj + sum | the MLP's two
    attention  norm + q, k, v | rotation, new keys and values | attention | o + sum | the MLP's two

with one kernel between bars: five, five and six, and one more for an attention of many parts. Where tokens may yet be
rejected, Mamba1's middle replays its rings in the same kernel; Mamba2's is the replay, with a gated norm behind it for
heads of more than 64 channels, and the convolution is part of in_proj, or a kernel of its own where that product is a
large one for tensor cores. Layers of pure Mamba models, which have no MLP, are four:

    stock Mamba1  norm + in_proj + conv | x_proj | dt_proj, state or replay, gate | out_proj + sum
    stock Mamba2  norm + in_proj + conv | replay | gated norm | out_proj + sum

For more rows products are PyTorch's own (cuBLAS), norm, gate and convolution are kernels beside them, and the sums are
still part of the products. Mamba1 layers run as they are from nine rows on.

Nothing is copied or moved: kernels take the parameters of the modules where they lie, so that saving, moving and
training a model are as before, and to let go of a step is to forget it. What is made of parameters beforehand is A =
−exp(A_log), which lies with the states, and on a CPU another layout of all weights
(:meth:`mambify.engine.tower.Tower.refresh`). Modules that have no such form (a projection that is not a plain linear
layer, another activation, stock Mamba2 with limits of Δ) run as they are.

Letters: S slots, T tokens read at once, M = S·T rows, D hidden size, E outputs of a projection, H query heads, G
key/value heads, P head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambify.engine.fused_mamba import FusedMamba1, FusedStockMamba1, FusedStockMamba2
from mambify.engine.fused_parts import Mix, Product, Reading, State, Unfused, is_hooked, is_plain
from mambify.engine.on_cpu import AttentionMiddle, Mamba2Middle, ReadPlans
from mambify.mixers import AttentionMixer, MixerContext, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.mixers.mamba1 import Mamba1Mixer
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.mixers.stock_mamba1 import StockMamba1Mixer
from mambify.mixers.stock_mamba2 import StockMamba2Mixer
from mambify.model import GatedMLP, HybridBlock, HybridForCausalLM
from mambify.norm import RMSNorm
from mambify.ops.decode_attention import decode_attention
from mambify.ops.decode_linear import Convolution
from mambify.ops.gated_norm import GatedNorm
from mambify.ops.mamba2_step import Mamba2Weights, mamba2_step
from mambify.ops.ring import RingPlace
from mambify.ops.rotate_kv import rotate_kv
from mambify.ops.ssd_replay import SSDRing, ssd_replay
from mambify.trimmed_head import TrimmedHead, known_logits

_MOST_STEPPED = 8  # slots up to which writing every state each step costs less than what else replay launches
_MOVING = ("dynamic", "longrope")  # rotations that depend on the length of the text, not on the position alone


def steps_at_once(model: HybridForCausalLM, slots: int) -> bool:
    """Whether tokens that are sure to stand had better go into the states at once, instead of into rings."""
    mixers = [block.mixer for block in model.model.layers if isinstance(block, HybridBlock)]
    recurrent = [mixer for mixer in mixers if not isinstance(mixer, AttentionMixer)]
    stepped = all(_is_fusible(mixer) and type(mixer) is not StockMamba2Mixer for mixer in recurrent)
    return slots <= _MOST_STEPPED and stepped


def can_fuse(model: HybridForCausalLM) -> bool:
    """Whether a model is one of these blocks, its rotations can be looked up by position, and no hook has a say."""
    moves = str(getattr(model.model.rotary_emb, "rope_type", "default")) in _MOVING
    blocks = all(type(block) is HybridBlock for block in model.model.layers)
    return blocks and not moves and not any(map(is_hooked, model.modules()))


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin before the one ahead of it ends: compute capability 9.0 (Hopper) or later."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
    )


class FusedStep:
    """Reads tokens into slots.

    Args:
        model: in evaluation mode.
        states: of its layers.
        lengths_S: tokens that stand in each slot; read at each step.
        places: the most tokens a slot may hold, new ones included.
        at_once: recurrent layers take their states on with every token; see :func:`steps_at_once`.
        overlap: kernels start, and products begin to read weights, while the kernel before them ends; on a GPU of
            compute capability 9.0 or later.
        packs: weights are laid out for a CPU's products; not with ``at_once``.
        product: of another step of the same model, for one that is part of it.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        states: Sequence[State],
        lengths_S: Tensor,
        *,
        places: int,
        at_once: bool = False,
        overlap: bool = False,
        packs: bool = False,
        product: Product | None = None,
    ) -> None:
        self._model, self._lengths_S = model, lengths_S
        self.product = product or Product(model.config.ops_backend, overlap, packs=packs)
        self._blocks: list[tuple[Mix, Callable[[Tensor], Tensor]]] = []
        self._needs_positions = False
        table = None
        counts_X = torch.zeros(
            len(lengths_S) * (model.config.num_key_value_heads or 0), dtype=torch.int32, device=model.device
        )
        for block, state in zip(model.model.layers, states, strict=True):
            assert isinstance(block, HybridBlock)
            mix: Mix
            if not _is_fusible(block.mixer):
                mix = Unfused(block, state)
                self._needs_positions |= isinstance(state, SlotKV)
            elif isinstance(state, SlotKV):
                table = _rotations(model, places) if table is None else table
                mix = _Attention(block, state, table, counts_X, self.product)
            else:
                mix = _RECURRENT[type(block.mixer)](block, state, self.product, at_once)
            self._blocks.append((mix, _feed_forward(block, self.product)))

    def stream(self, token_ST: Tensor, place: RingPlace, features_STD: Tensor | None = None) -> Tensor:
        """As :meth:`mambify.engine.tower.Tower.stream`."""
        S, T = token_ST.shape
        x_MD = self._begin(token_ST, features_STD)
        plans = ReadPlans(place, self._lengths_S, T) if self.product.packs else None
        reading = Reading((S, T), place, self._contexts(x_MD, token_ST), plans)
        for mix, feed_forward in self._blocks:
            x_MD = feed_forward(mix(x_MD, reading))
        return x_MD.view(*token_ST.shape, -1)

    def logits(self, x_STD: Tensor) -> Tensor:
        """As :meth:`mambify.engine.tower.Tower.logits`."""
        head, norm = self._model.lm_head, self._model.model.norm
        if is_plain(head) or type(head) is TrimmedHead:  # a product with the rows of the words that it knows
            return self.product(x_STD.flatten(0, 1), [head], norm=norm).view(*x_STD.shape[:2], -1)
        return known_logits(head, norm(x_STD))

    def _begin(self, token_ST: Tensor, features_STD: Tensor | None) -> Tensor:
        """Embeddings ``[M, D]``, and in a draft that reads hidden states what these add, as products of this step."""
        core = self._model.model
        start = core.feature_input
        if start is None or features_STD is None or not is_plain(start.embedding_proj, start.feature_proj):
            return core.embed(token_ST, features_STD).flatten(0, 1)
        e_MD = core.embed_tokens(token_ST.flatten())
        x_MD = self.product(e_MD, [start.embedding_proj]).to(e_MD.dtype)
        return self.product(features_STD.flatten(0, 1), [start.feature_proj], norm=start.norm, add_to=x_MD)

    def refresh(self) -> None:
        """Lets go of what was made of weights: for when these have changed where they lie."""
        self.product.forget()

    def _contexts(self, x_MD: Tensor, token_ST: Tensor) -> tuple[MixerContext, MixerContext]:
        if not self._needs_positions:
            return MixerContext(), MixerContext()
        position_ST = self._lengths_S[:, None] + torch.arange(token_ST.shape[1], device=token_ST.device)
        return MixerContext(position_embeddings=self._model.model.rotary_emb(x_MD, position_ST)), MixerContext()


class _Mamba2:
    def __init__(self, block: HybridBlock, state: State, product: Product, at_once: bool) -> None:
        mixer = block.mixer
        assert isinstance(mixer, Mamba2Mixer) and isinstance(state, ReplayState) and isinstance(state.ring, SSDRing)
        self._block, self._mixer, self._state, self._ring, self._product = block, mixer, state, state.ring, product
        self._at_once = at_once
        self._weights = Mamba2Weights(
            mixer.conv1d.weight.detach().squeeze(1),
            None if mixer.conv1d.bias is None else mixer.conv1d.bias.detach(),
            mixer.dt_bias.detach(),
            state.A,
            mixer.D.detach(),
            mixer.norm.weight.detach().view(mixer.num_heads, mixer.head_dim),
            mixer.norm.eps,
        )
        self._middle = Mamba2Middle(mixer, state, state.ring, self._weights) if product.packs else None

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        mixer, weights = self._mixer, self._weights
        if reading.plans is not None and self._middle is not None and reading.plans.all_active:
            zxBCdt_ME = self._product(x_MD, [mixer.in_proj], norm=self._block.input_layernorm)
            y_MI = self._middle(zxBCdt_ME.unflatten(0, reading.shape), reading.plans.ring(self._middle.width))
            return self._product(y_MI, [mixer.out_proj], add_to=x_MD)
        backend, place, conv = mixer.ops_backend, reading.place, self._state.conv
        if self._at_once:
            zxBCdt_ME = self._product(x_MD, [mixer.in_proj], norm=self._block.input_layernorm)
            y_MHP = mamba2_step(
                zxBCdt_ME, weights, self._state.ssm, conv, place, overlap=self._product.overlap, backend=backend
            )
        else:
            inner = mixer.num_heads * mixer.head_dim
            channels = Convolution(inner, weights.conv_CK, weights.conv_bias_C, conv, place)
            both = self._product.convolved(x_MD, mixer.in_proj, channels, norm=self._block.input_layernorm)
            zxBCdt_STE, xBC_STC = (part.unflatten(0, reading.shape) for part in both)
            y_MHP = self._replay(zxBCdt_STE, xBC_STC, place, backend).flatten(0, 1)
        return self._product(y_MHP.flatten(1), [mixer.out_proj], add_to=x_MD)

    def _replay(self, zxBCdt_STE: Tensor, xBC_STC: Tensor, place: RingPlace, backend: str) -> Tensor:
        """``xBC_STC``: convolved."""
        mixer, weights = self._mixer, self._weights
        H, G, P, N = mixer.num_heads, mixer.num_groups, mixer.head_dim, mixer.state_size
        z_STI, _, dt_STH = zxBCdt_STE.split([H * P, sum(mixer.conv_split), H], dim=-1)
        x_STI, B_STI, C_STI = xBC_STC.split(mixer.conv_split, dim=-1)
        norm = GatedNorm(z_STI.unflatten(-1, (H, P)), weights.norm_HP, weights.eps)
        return ssd_replay(
            x_STI.unflatten(-1, (G, P)),
            dt_STH,
            weights.A_H,
            B_STI.unflatten(-1, (G, N)),
            C_STI.unflatten(-1, (H, N)),
            weights.D_H,
            self._state.ssm,
            self._ring,
            place,
            dt_bias_H=weights.dt_bias_H,
            norm=norm,
            overlap=self._product.overlap,
            backend=backend,
        )


class _Attention:
    def __init__(
        self, block: HybridBlock, state: State, table: tuple[Tensor, Tensor], counts_X: Tensor, product: Product
    ) -> None:
        assert isinstance(block.mixer, AttentionMixer) and isinstance(state, SlotKV)
        self._block, self._mixer, self._state, self._product = block, block.mixer, state, product
        self._cos_LJ, self._sin_LJ = table
        self._counts_X = counts_X  # one for all layers, which follow each other
        self._middle = AttentionMiddle(block.mixer, state)
        self._looks = block.mixer.attend.num_key_value_groups, block.mixer.attend.sliding_window

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        mixer, state = self._mixer, self._state
        qkv_ME = self._product(x_MD, [mixer.q_proj, mixer.k_proj, mixer.v_proj], norm=self._block.input_layernorm)
        if reading.plans is not None:
            plan = reading.plans.kv(*self._looks, (self._cos_LJ, self._sin_LJ))
            y_MI = self._middle(qkv_ME.unflatten(0, reading.shape), plan)
            return self._product(y_MI, [mixer.o_proj], add_to=x_MD)
        norms: dict[str, Any] = {}
        if isinstance(mixer.q_norm, RMSNorm) and isinstance(mixer.k_norm, RMSNorm):
            assert mixer.q_norm.eps is not None
            norms = {"q_norm_P": mixer.q_norm.weight, "k_norm_P": mixer.k_norm.weight, "eps": mixer.q_norm.eps}
        q_STHP = rotate_kv(
            qkv_ME.unflatten(0, reading.shape), self._cos_LJ, self._sin_LJ, *state, overlap=self._product.overlap,
            backend=self._product.backend, **norms,
        )  # fmt: skip
        y_STHP = decode_attention(
            q_STHP,
            state.keys_SGLP,
            state.values_SGLP,
            state.lengths_S,
            more=reading.shape[1],
            scaling=mixer.attend.scaling,
            window=mixer.attend.sliding_window,
            counts_X=self._counts_X,
            overlap=self._product.overlap,
            backend=self._product.backend,
        )
        return self._product(y_STHP.flatten(0, 1).flatten(1), [mixer.o_proj], add_to=x_MD)


def _feed_forward(block: HybridBlock, product: Product) -> Callable[[Tensor], Tensor]:
    mlp = block.mlp
    if mlp is None:
        return block.feed_forward
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if type(mlp) is not GatedMLP or mlp.config.hidden_act != "silu" or not is_plain(*parts):
        return block.feed_forward

    def run(x_MD: Tensor) -> Tensor:
        inner_MF = product(x_MD, parts[:2], norm=block.post_attention_layernorm, gated=True)
        return product(inner_MF, parts[2:], add_to=x_MD)

    return run


def _is_fusible(mixer: nn.Module) -> bool:
    if type(mixer) is AttentionMixer:
        return is_plain(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
    if type(mixer) is StockMamba1Mixer:
        return is_plain(mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if type(mixer) is Mamba1Mixer:
        return is_plain(mixer.in_proj, mixer.dt_proj, mixer.out_proj)
    if type(mixer) is StockMamba2Mixer:
        return mixer.dt_limits == (0.0, None) and is_plain(mixer.in_proj, mixer.out_proj)
    return type(mixer) is Mamba2Mixer and is_plain(mixer.in_proj, mixer.out_proj)


_RECURRENT: dict[type[nn.Module], Callable[[HybridBlock, State, Product, bool], Mix]] = {
    Mamba2Mixer: _Mamba2,
    Mamba1Mixer: FusedMamba1,
    StockMamba1Mixer: FusedStockMamba1,
    StockMamba2Mixer: FusedStockMamba2,
}


@torch.no_grad()
def _rotations(model: HybridForCausalLM, places: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, ``[L, P/2]``, rounded as the model rounds them."""
    position_1L = torch.arange(places, device=model.device)[None]
    cos_1LP, sin_1LP = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), position_1L)
    cos_LJ, sin_LJ = (table[0, :, : table.shape[-1] // 2].contiguous() for table in (cos_1LP, sin_1LP))
    return cos_LJ, sin_LJ
