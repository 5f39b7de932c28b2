"""A model's step over fixed buffers in few kernels, on the modules' own parameters.

Reading a token is reading every weight once; what a layer does between its products costs a launch each time it is a
kernel of its own. For up to eight rows (S·T) a layer is

    Mamba2     norm + in_proj | conv, Δ, state, gated norm | out_proj + sum | norm + gate, up, SiLU | down + sum
    attention  norm + q, k, v | rotation, new keys and values | attention | its parts | o + sum | the MLP's two

with one kernel between bars: five and seven. Where tokens may yet be rejected, a Mamba2 layer's middle is three: the
convolution and the replay on their rings, and the gated norm. For more rows products are PyTorch's own (cuBLAS), norm
and gate are kernels beside them, and the sums are still part of the products.

Nothing is copied or moved: kernels take the parameters of the modules where they lie, so that saving, moving and
training a model are as before, and to let go of a step is to forget it. What is made from parameters when a step is
made are A = −exp(A_log) of Mamba2 layers and the table of rotations: after training, make a new one. Modules that have
no such form (Mamba1, a projection that is not a plain linear layer, another activation) run as they are.

Letters: S slots, T tokens read at once, M = S·T rows, D hidden size, E outputs of a projection, H query heads, G
key/value heads, P head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mambify.engine.memory import packs
from mambify.engine.on_cpu import AttentionMiddle, Mamba2Middle, ReadPlans
from mambify.mixers import AttentionMixer, MixerContext, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.mixers.linear import PaddedLinear
from mambify.mixers.mamba2 import Mamba2Mixer
from mambify.model import GatedMLP, HybridBlock, HybridForCausalLM
from mambify.norm import RMSNorm
from mambify.ops.conv_replay import conv_replay
from mambify.ops.decode_attention import decode_attention
from mambify.ops.decode_linear import Packed, decode_linear, decode_packed, pack
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.mamba2_step import Mamba2Weights, mamba2_step
from mambify.ops.ring import RingPlace
from mambify.ops.rotate_kv import rotate_kv
from mambify.ops.ssd_replay import SSDRing, ssd_replay
from mambify.trimmed_head import TrimmedHead, known_logits

_MOST_STEPPED = 8  # slots up to which writing every state each step costs less than what else replay launches
_MOVING = ("dynamic", "longrope")  # rotations that depend on the length of the text, not on the position alone

State = SlotKV | ReplayState


class Reading(NamedTuple):
    """What all layers share of one read.

    Attributes:
        shape: S and T.
        place: where recurrent layers stand in their rings.
        ends_S: tokens in each slot with the new ones.
        contexts: for mixers that run as they are, attention's and the others'.
        plans: on a CPU, what the host found out for all layers.
    """

    shape: tuple[int, int]
    place: RingPlace
    ends_S: Tensor
    contexts: tuple[MixerContext, MixerContext]
    plans: ReadPlans | None


#: adds what a mixer makes of the stream [M, D] to it, in place where that spares a kernel
_Mix = Callable[[Tensor, Reading], Tensor]


def steps_at_once(model: HybridForCausalLM, slots: int) -> bool:
    """Whether tokens that are sure to stand had better go into the states at once, instead of into rings."""
    mixers = [block.mixer for block in model.model.layers if isinstance(block, HybridBlock)]
    recurrent = [mixer for mixer in mixers if not isinstance(mixer, AttentionMixer)]
    return slots <= _MOST_STEPPED and all(map(_is_fusible, recurrent)) and not packs(model)


def can_fuse(model: HybridForCausalLM) -> bool:
    """Whether a model is one of these blocks, each with its MLP, and its rotations can be looked up by position."""
    moves = str(getattr(model.model.rotary_emb, "rope_type", "default")) in _MOVING
    return not moves and all(type(block) is HybridBlock and block.mlp is not None for block in model.model.layers)


class FusedStep:
    """Reads tokens into slots.

    Args:
        model: in evaluation mode.
        states: of its layers.
        lengths_S: tokens that stand in each slot; read at each step.
        places: the most tokens a slot may hold, new ones included.
        at_once: Mamba2 layers take their states on with every token; see :func:`steps_at_once`.
        overlap: products begin to read weights while the kernel before them ends; on a GPU of compute capability 9.0
            or later.
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
    ) -> None:
        self._model, self._lengths_S = model, lengths_S
        self._plans = packs(model) and not at_once
        self._product = _Product(model.config.ops_backend, overlap, packs=self._plans)
        self._blocks: list[tuple[_Mix, Callable[[Tensor], Tensor]]] = []
        self._needs_positions = False
        table = None
        for block, state in zip(model.model.layers, states, strict=True):
            assert isinstance(block, HybridBlock)
            mix: _Mix
            if not _is_fusible(block.mixer):
                mix = _Unfused(block, state)
                self._needs_positions |= isinstance(state, SlotKV)
            elif isinstance(state, SlotKV):
                table = _rotations(model, places) if table is None else table
                mix = _Attention(block, state, table, self._product)
            else:
                mix = _Mamba2(block, state, self._product, at_once=at_once)
            self._blocks.append((mix, _feed_forward(block, self._product)))

    def read(self, token_ST: Tensor, place: RingPlace, *, logits: bool = True) -> Tensor | None:
        """As :meth:`mambify.engine.tower.Tower.read`."""
        core, T = self._model.model, token_ST.shape[1]
        x_MD: Tensor = core.embed_tokens(token_ST.flatten())
        plans = ReadPlans(place, self._lengths_S, T) if self._plans else None
        reading = Reading(tuple(token_ST.shape), place, self._lengths_S + T, self._contexts(x_MD, token_ST), plans)  # type: ignore[arg-type]
        for mix, feed_forward in self._blocks:
            x_MD = feed_forward(mix(x_MD, reading))
        if not logits:
            return None
        head = self._model.lm_head
        if _is_plain(head) or type(head) is TrimmedHead:  # a product with the rows of the words that it knows
            found = self._product(x_MD, [head], norm=core.norm)
        else:
            found = known_logits(head, core.norm(x_MD))
        return found.view(*token_ST.shape, -1)

    def _contexts(self, x_MD: Tensor, token_ST: Tensor) -> tuple[MixerContext, MixerContext]:
        if not self._needs_positions:
            return MixerContext(), MixerContext()
        position_ST = self._lengths_S[:, None] + torch.arange(token_ST.shape[1], device=token_ST.device)
        return MixerContext(position_embeddings=self._model.model.rotary_emb(x_MD, position_ST)), MixerContext()


class _Product:
    """Linear modules of one input; see :func:`mambify.ops.decode_linear.decode_linear`."""

    def __init__(self, backend: str, overlap: bool, *, packs: bool) -> None:
        self.backend, self._overlap, self.packs = backend, overlap, packs
        self._packed: dict[nn.Linear, Packed] = {}  # by the first of those that are read together

    def __call__(
        self,
        x_MD: Tensor,
        linears: Sequence[nn.Linear],
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        eps = 0.0 if norm is None else norm.eps or torch.finfo(x_MD.dtype).eps
        if self.packs:
            packed = self._packed.get(linears[0])
            if packed is None:
                packed = pack([linear.weight for linear in linears], [linear.bias for linear in linears])
                self._packed[linears[0]] = packed
            norm_D = None if norm is None else norm.weight
            return decode_packed(x_MD, packed, norm_D=norm_D, eps=eps, gated=gated, add_to_MO=add_to)
        return decode_linear(
            x_MD,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            norm_D=None if norm is None else norm.weight,
            eps=eps,
            gated=gated,
            add_to_MO=add_to,
            overlap=self._overlap,
            backend="reference" if self.backend == "reference" else "auto",
        )


class _Mamba2:
    def __init__(self, block: HybridBlock, state: State, product: _Product, *, at_once: bool) -> None:
        mixer = block.mixer
        assert isinstance(mixer, Mamba2Mixer) and isinstance(state, ReplayState) and isinstance(state.ring, SSDRing)
        self._block, self._mixer, self._state, self._ring, self._product = block, mixer, state, state.ring, product
        self._at_once = at_once
        self._weights = Mamba2Weights(
            mixer.conv1d.weight.detach().squeeze(1),
            None if mixer.conv1d.bias is None else mixer.conv1d.bias.detach(),
            mixer.dt_bias.detach(),
            -mixer.A_log.detach().float().exp(),
            mixer.D.detach(),
            mixer.norm.weight.detach().view(mixer.num_heads, mixer.head_dim),
            mixer.norm.eps,
        )
        self._middle = Mamba2Middle(mixer, state, state.ring, self._weights) if product.packs else None

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        zxBCdt_ME = self._product(x_MD, [self._mixer.in_proj], norm=self._block.input_layernorm)
        backend, place = self._mixer.ops_backend, reading.place
        if reading.plans is not None and self._middle is not None and reading.plans.all_active:
            y_MI = self._middle(zxBCdt_ME.unflatten(0, reading.shape), reading.plans.ring(self._middle.width))
            return self._product(y_MI, [self._mixer.out_proj], add_to=x_MD)
        if self._at_once:
            y_MHP = mamba2_step(zxBCdt_ME, self._weights, self._state.ssm, self._state.conv, place, backend=backend)
        else:
            y_MHP = self._replay(zxBCdt_ME.unflatten(0, reading.shape), place, backend).flatten(0, 1)
        return self._product(y_MHP.flatten(1), [self._mixer.out_proj], add_to=x_MD)

    def _replay(self, zxBCdt_STE: Tensor, place: RingPlace, backend: str) -> Tensor:
        mixer, weights = self._mixer, self._weights
        H, G, P, N = mixer.num_heads, mixer.num_groups, mixer.head_dim, mixer.state_size
        z_STI, xBC_STC, dt_STH = zxBCdt_STE.split([H * P, sum(mixer.conv_split), H], dim=-1)
        xBC_STC = conv_replay(xBC_STC, weights.conv_CK, weights.conv_bias_C, self._state.conv, place, backend=backend)
        x_STI, B_STI, C_STI = xBC_STC.split(mixer.conv_split, dim=-1)
        y_STHP = ssd_replay(
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
            backend=backend,
        )
        return gated_rms_norm(y_STHP, z_STI.unflatten(-1, (H, P)), weights.norm_HP, weights.eps, backend)


class _Attention:
    def __init__(self, block: HybridBlock, state: State, table: tuple[Tensor, Tensor], product: _Product) -> None:
        assert isinstance(block.mixer, AttentionMixer) and isinstance(state, SlotKV)
        self._block, self._mixer, self._state, self._product = block, block.mixer, state, product
        self._cos_LJ, self._sin_LJ = table
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
            qkv_ME.unflatten(0, reading.shape), self._cos_LJ, self._sin_LJ, *state, backend=self._product.backend,
            **norms,
        )  # fmt: skip
        y_STHP = decode_attention(
            q_STHP,
            state.keys_SGLP,
            state.values_SGLP,
            reading.ends_S,
            scaling=mixer.attend.scaling,
            window=mixer.attend.sliding_window,
            backend=self._product.backend,
        )
        return self._product(y_STHP.flatten(0, 1).flatten(1), [mixer.o_proj], add_to=x_MD)


class _Unfused:
    """A mixer as it is."""

    def __init__(self, block: HybridBlock, state: State) -> None:
        self._block, self._state = block, state

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        state, (with_positions, without) = self._state, reading.contexts
        context = with_positions
        if isinstance(state, ReplayState):
            state, context = state._replace(place=reading.place), without
        normed_STD = self._block.input_layernorm(x_MD).unflatten(0, reading.shape)
        y_STD: Tensor = self._block.mixer(normed_STD, context, state)[0]
        return x_MD + y_STD.flatten(0, 1)


def _feed_forward(block: HybridBlock, product: _Product) -> Callable[[Tensor], Tensor]:
    mlp = block.mlp
    assert mlp is not None  # :func:`can_fuse`
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if type(mlp) is not GatedMLP or mlp.config.hidden_act != "silu" or not all(map(_is_plain, parts)):
        return block.feed_forward

    def run(x_MD: Tensor) -> Tensor:
        inner_MF = product(x_MD, parts[:2], norm=block.post_attention_layernorm, gated=True)
        return product(inner_MF, parts[2:], add_to=x_MD)

    return run


def _is_fusible(mixer: nn.Module) -> bool:
    if type(mixer) is AttentionMixer:
        return all(map(_is_plain, (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)))
    return type(mixer) is Mamba2Mixer and _is_plain(mixer.in_proj) and _is_plain(mixer.out_proj)


def _is_plain(module: nn.Module) -> bool:
    """Whether a projection is its weight and its bias and nothing else, such as an adapter."""
    return type(module) in (nn.Linear, PaddedLinear)


@torch.no_grad()
def _rotations(model: HybridForCausalLM, places: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, ``[L, P/2]``, rounded as the model rounds them."""
    position_1L = torch.arange(places, device=model.device)[None]
    cos_1LP, sin_1LP = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), position_1L)
    cos_LJ, sin_LJ = (table[0, :, : table.shape[-1] // 2].contiguous() for table in (cos_1LP, sin_1LP))
    return cos_LJ, sin_LJ
