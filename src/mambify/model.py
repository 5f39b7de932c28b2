"""HybridForCausalLM: embed → blocks → norm → head. Knows no family and no mixer by name.

One class is the teacher (attention everywhere), the student (some layers converted) and the draft, in training and in
inference. The blocks carry transformers' weight names; a layer's mixer is ``model.layers.{i}.mixer``.

Legend: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mambify.cache import RecurrentCache
from mambify.config import ATTENTION, LINEAR, HybridConfig
from mambify.errors import InvalidOptionError, UnsupportedError, did_you_mean
from mambify.feature_input import FeatureInput
from mambify.hub import HubModel
from mambify.mixers import MIXERS, Mixer, MixerContext
from mambify.mixers.attention import SoftmaxAttention
from mambify.norm import RMSNorm, StreamRMSNorm
from mambify.ops.swiglu import swiglu
from mambify.trimmed_head import TrimmedHead

_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    LINEAR: create_recurrent_attention_mask,
}


class MixerTrace(NamedTuple):
    """What one layer's mixer read and gave: the pair that alignment teaches a new mixer.

    Attributes:
        layer_idx: which layer.
        input_BTD: the normed hidden states it read.
        output_BTD: what it added to the residual stream.
        seq_idx_BT: document numbers of packed rows, or ``None``.
    """

    layer_idx: int
    input_BTD: Tensor
    output_BTD: Tensor
    seq_idx_BT: Tensor | None


def new_cache(config: HybridConfig) -> DynamicCache:
    """An empty cache for the layers that ``config`` describes."""
    return DynamicCache(config=config) if config.attention_layers else RecurrentCache(config=config)


def _positions_in_documents(seq_idx_BT: Tensor) -> Tensor:
    """How many tokens of its own document come before each token, ``[B, T]``; a document is a run of one number."""
    index_T = torch.arange(seq_idx_BT.shape[1], device=seq_idx_BT.device)
    starts_BT = torch.ones_like(seq_idx_BT, dtype=torch.bool)
    starts_BT[:, 1:] = seq_idx_BT[:, 1:] != seq_idx_BT[:, :-1]
    return index_T - (index_T * starts_BT).cummax(dim=1).values


class GatedMLP(LlamaMLP):  # type: ignore[misc]
    """down(act(gate(x)) · up(x)), the activation and its product as one operation where it is SiLU."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor
        if self.config.hidden_act == "silu":
            y_BTD = self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        else:
            y_BTD = super().forward(x_BTD)
        return y_BTD


def _norm(config: HybridConfig) -> RMSNorm:
    kind = StreamRMSNorm if config.residual_in_fp32 else RMSNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class HybridBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP; norms and MLP are the teacher's."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_mixers is not None
        self.layer_idx = layer_idx
        self.input_layernorm = _norm(config)
        name = config.layer_mixers[layer_idx]
        if name not in MIXERS:
            raise InvalidOptionError(f"unknown mixer '{name}' of layer {layer_idx}: {did_you_mean(name, MIXERS)}")
        self.mixer: Mixer = MIXERS[name](config, layer_idx)
        has_mlp = config.intermediate_size > 0
        self.post_attention_layernorm = _norm(config) if has_mlp else None
        self.mlp = GatedMLP(config) if has_mlp else None

    def forward(self, x_BTD: Tensor, context: MixerContext, past_key_values: Cache | None = None) -> Tensor:
        state = None if past_key_values is None else self.mixer.load_state(past_key_values)
        y_BTD, state = self.mixer(self.input_layernorm(x_BTD), context, state)
        if past_key_values is not None:
            self.mixer.store_state(past_key_values, state)
        return self.feed_forward(x_BTD + y_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The second half of the block: x + mlp(norm(x)), or x itself where there is no MLP."""
        if self.mlp is None or self.post_attention_layernorm is None:
            return x_BTD
        y_BTD: Tensor = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + y_BTD


class StreamEmbedding(nn.Embedding):
    """Begins a residual stream in float32; what is added to it is promoted, and :class:`StreamRMSNorm` rounds again."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


class HybridRotaryEmbedding(LlamaRotaryEmbedding):  # type: ignore[misc]
    """RoPE whose frequencies stay float32 when the model is cast: rounded ones turn far positions by whole radians."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class HybridPreTrainedModel(HubModel):
    """What transformers has to know about hybrid models."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HybridBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = sorted(
        {name for mixer in MIXERS.values() for name in mixer.float32_parameters}
    )
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True  # a recurrent state cannot be cropped
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": HybridBlock,
        "attentions": OutputRecorder(SoftmaxAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.init_random()


class HybridModel(HybridPreTrainedModel):
    """The stack without the head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        embedding = StreamEmbedding if config.residual_in_fp32 else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.feature_input: FeatureInput | None = None
        if config.draft_features:
            self.feature_input = FeatureInput(config.hidden_size, _norm(config))
        self.layers = nn.ModuleList(HybridBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.rotary_emb = HybridRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]`` after the final norm.

        Rows that pack several documents are recognised by ``position_ids`` that restart (no ``attention_mask``, no
        cache), or by ``seq_idx [B, T]``, a number for each token's document; attention and recurrent states then stay
        inside each document, and no cache is made.

        A draft that reads hidden states needs ``features [B, T, D]``: see :class:`FeatureInput`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        features = kwargs.pop("features", None)
        x_BTD = inputs_embeds if input_ids is None else self.embed(input_ids, features)
        assert x_BTD is not None
        seq_idx = kwargs.pop("seq_idx", None)
        if seq_idx is not None:
            if attention_mask is not None or past_key_values is not None:
                raise ValueError(
                    "seq_idx is for whole rows without padding: give no attention_mask and no cache with it"
                )
            if position_ids is None:
                position_ids = _positions_in_documents(seq_idx)
        elif position_ids is not None and attention_mask is None and past_key_values is None:
            seq_idx = find_packed_sequence_indices(position_ids.expand(x_BTD.shape[0], -1))
        if use_cache and past_key_values is None and seq_idx is None:  # packed rows are not continued
            past_key_values = new_cache(self.config)
        if position_ids is None:
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] + self._num_seen(past_key_values)

        contexts = self.contexts(x_BTD, attention_mask, position_ids, past_key_values, seq_idx, kwargs)
        for layer, kind in zip(self.layers, self.config.layer_types or (), strict=True):
            x_BTD = layer(x_BTD, contexts[kind], past_key_values=past_key_values)
        if isinstance(past_key_values, RecurrentCache):
            past_key_values.num_seen += x_BTD.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def embed(self, input_ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Where the residual stream begins, ``[…, D]``, of tokens ``[…]``; see :class:`FeatureInput` for features."""
        x_xD: Tensor = self.embed_tokens(input_ids)
        return x_xD if self.feature_input is None else self.feature_input(x_xD, features)

    def stream(
        self, input_ids: Tensor, features: Tensor | None = None, *, position_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states ``[B, T, D]`` before the final norm, of whole rows; ``position_ids`` as in layer_contexts."""
        x_BTD = self.embed(input_ids, features)
        contexts, _ = self.layer_contexts(x_BTD, position_ids)
        for layer, context in zip(self.layers, contexts, strict=True):
            x_BTD = layer(x_BTD, context)
        return x_BTD

    @torch.no_grad()
    def mixer_traces(
        self, input_ids: Tensor, layers: Collection[int], position_ids: Tensor | None = None
    ) -> Iterator[MixerTrace]:
        """Runs block by block and yields what the mixers of ``layers`` read and gave; stops after the last of them."""
        wanted = set(layers)
        x_BTD = self.embed(input_ids)
        contexts, seq_idx_BT = self.layer_contexts(x_BTD, position_ids)
        for index, (layer, context) in enumerate(zip(self.layers, contexts, strict=True)):
            assert isinstance(layer, HybridBlock)
            if not wanted:
                return
            normed_BTD = layer.input_layernorm(x_BTD)
            y_BTD, _ = layer.mixer(normed_BTD, context, None)
            if index in wanted:
                wanted.discard(index)
                yield MixerTrace(index, normed_BTD, y_BTD, seq_idx_BT)
            x_BTD = layer.feed_forward(x_BTD + y_BTD)

    def layer_contexts(
        self, x_BTD: Tensor, position_ids: Tensor | None = None
    ) -> tuple[list[MixerContext], Tensor | None]:
        """What each layer gets to know of whole rows, and the document numbers ``[B, T]`` of packed ones.

        Args:
            x_BTD: the embedded tokens; only shape, dtype and device matter.
            position_ids: restart at 0 with every document of a packed row; ``None`` for one document a row.
        """
        seq_idx_BT = None
        if position_ids is None:
            position_ids = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        else:
            seq_idx_BT = find_packed_sequence_indices(position_ids.expand(x_BTD.shape[0], -1))
        by_kind = self.contexts(x_BTD, None, position_ids, None, seq_idx_BT, {})
        return [by_kind[kind] for kind in self.config.layer_types or ()], seq_idx_BT

    def _num_seen(self, past_key_values: Cache | None) -> int:
        """Tokens in the cache; a model without attention does not count them, for it needs no positions."""
        if past_key_values is None or not self.config.attention_layers:
            return 0
        return int(past_key_values.get_seq_length())

    def contexts(
        self,
        x_BTD: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        seq_idx_BT: Tensor | None,
        attention_kwargs: dict[str, Any],
    ) -> dict[str, MixerContext]:
        """What the layers of each kind get to know."""
        kinds = set(self.config.layer_types or ())
        masks: dict[str, Tensor | None] | Any = attention_mask
        attention_kwargs = {"position_ids": position_ids} | attention_kwargs  # flash attention finds documents by them
        backend = self.config._attn_implementation or ""
        several = seq_idx_BT is not None and len(seq_idx_BT) > 1 and "cu_seq_lens_q" not in attention_kwargs
        if several and "flash" in backend and kinds - {LINEAR} and not torch.compiler.is_compiling():
            raise UnsupportedError(f"{backend} keeps packed documents apart in a batch of one row only: use sdpa")
        if not isinstance(attention_mask, dict):
            # The masks find documents by positions that restart; looking for them waits for the GPU.
            packed = None if seq_idx_BT is None else _positions_in_documents(seq_idx_BT)
            arguments = {
                "config": self.config,
                "inputs_embeds": x_BTD,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": packed,
            }
            masks = {
                kind: None if self._is_plainly_causal(kind, arguments) else _MASKS[kind](**arguments) for kind in kinds
            }
        position_embeddings = None
        if kinds - {LINEAR}:
            position_embeddings = self.rotary_emb(x_BTD, position_ids)
        return {
            kind: MixerContext(padding_mask_BT=masks.get(kind), seq_idx_BT=seq_idx_BT)
            if kind == LINEAR
            else MixerContext(
                position_embeddings=position_embeddings,
                attention_mask=masks[kind],
                attention_kwargs=attention_kwargs,
            )
            for kind in kinds
        }

    def _is_plainly_causal(self, kind: str, arguments: dict[str, Any]) -> bool:
        """Whether whole rows of one document each meet a backend that needs no mask to be causal.

        transformers finds this out by itself, except while a CUDA graph is recorded: there it makes a ``[B, 1, T, T]``
        mask, which keeps attention from its fastest kernels and is saved for the backward pass by every layer.
        """
        if self.config._attn_implementation != "sdpa" or kind == LINEAR:
            return False
        if any(arguments[name] is not None for name in ("attention_mask", "past_key_values", "position_ids")):
            return False
        window, tokens = self.config.sliding_window, arguments["inputs_embeds"].shape[1]
        return kind == "full_attention" or (window is not None and tokens <= window)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model whose layers are attention or Mamba, each where :class:`HybridConfig` says."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        if config.draft_vocabulary is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = TrimmedHead(config.hidden_size, config.vocab_size, config.draft_vocabulary)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]`` (of the last ``logits_to_keep`` positions, 0 meaning all), and the loss of labels."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values") is not None
        if not self.config.attention_layers and generation_config.use_cache and not given:
            model_kwargs["past_key_values"] = new_cache(self.config)
            generation_config.cache_implementation = None  # recurrent states have a fixed size in every one of them
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @property
    def num_converted(self) -> int:
        """How many layers no longer are attention."""
        return sum(mixer != ATTENTION for mixer in self.config.layer_mixers or ())


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
