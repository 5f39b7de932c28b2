"""HybridForCausalLM out of vLLM's own layers: paged attention, its Mamba2 mixer, its parallel projections.

vLLM imports this module by name; nothing else of mambify does. Sequences of a batch lie behind one another in one
dimension, as everywhere in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import maybe_prefix

from mambify.config import ATTENTION, HybridConfig
from mambify.errors import CheckpointError
from mambify.families.granite_layout import GraniteLayout
from mambify.integrations.vllm.config import served_layout
from mambify.integrations.vllm.weights import served_weights


class ServedAttention(nn.Module):
    """Attention with a head dimension of its own and, where the teacher has them, norms on q and k."""

    def __init__(
        self,
        config: HybridConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        assert config.head_dim and config.num_key_value_heads
        ranks, heads, groups = (
            get_tensor_model_parallel_world_size(),
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        if heads % ranks or (groups % ranks and ranks % groups):
            raise ValueError(f"tensor parallel size {ranks} divides neither {heads} heads nor {groups} key/value heads")
        self.head_dim = config.head_dim
        self.q_size = heads // ranks * self.head_dim
        self.kv_size = max(1, groups // ranks) * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            heads,
            groups,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            heads // ranks,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=max(1, groups // ranks),
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(*q.shape[:-1], -1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(*k.shape[:-1], -1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        y: Tensor = self.o_proj(self.attn(q, k, v))[0]
        return y


class ServedLayer(nn.Module):
    """norm → mixer → residual → norm → MLP → residual."""

    def __init__(
        self,
        config: HybridConfig,
        layout: GraniteLayout,
        index: int,
        model_config: ModelConfig | None,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        assert config.layer_mixers
        H, P = layout.num_heads, layout.head_dim
        self.is_attention = config.layer_mixers[index] == ATTENTION
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_attention:
            self.mixer = ServedAttention(config, cache_config, quant_config, f"{prefix}.mixer")
        else:
            self.mixer = MambaMixer2(
                hidden_size=config.hidden_size,
                ssm_state_size=P,
                conv_kernel_size=config.conv_kernel,
                intermediate_size=H * P,
                use_conv_bias=True,
                use_bias=layout.mixer_bias,
                n_groups=H,
                num_heads=H,
                head_dim=P,
                rms_norm_eps=config.rms_norm_eps,
                activation="silu",
                model_config=model_config,
                cache_config=cache_config,
                quant_config=quant_config,
                prefix=f"{prefix}.mixer",
            )
        self.mlp = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + (self.mixer(positions, normed) if self.is_attention else self.mixer(normed))
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


# The dimensions are named, for vLLM would look for them in annotations, which are strings here.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class ServedModel(nn.Module):
    """The stack without the head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HybridConfig = vllm_config.model_config.hf_config
        layout = served_layout(config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ServedLayer(
                config,
                layout,
                index,
                vllm_config.model_config,
                vllm_config.cache_config,
                vllm_config.quant_config,
                maybe_prefix(prefix, f"layers.{index}"),
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(positions, x)
        y: Tensor = self.norm(x)
        return y


class HybridForCausalLM(nn.Module, HasInnerState, IsHybrid):  # type: ignore[misc]
    """What vLLM loads for the architecture of that name; no pipeline parallelism."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HybridConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = ServedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        y: Tensor = self.model.embed_tokens(input_ids)
        return y

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        y: Tensor = self.model(input_ids, positions, inputs_embeds)
        return y

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of hidden states."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Puts the weights of a saved directory in; returns the names of the parameters that were filled.

        Raises:
            CheckpointError: a weight has no place here.
        """
        parameters = dict(self.named_parameters())
        filled: set[str] = set()
        for served in served_weights(self.config, weights):
            if served.parameter not in parameters:
                raise CheckpointError(f"weight '{served.parameter}' has no place in this architecture")
            parameter = parameters[served.parameter]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, served.tensor, *(() if served.part is None else (served.part,)))
            filled.add(served.parameter)
        return filled

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Types of the convolution's window and of the state."""
        cache = vllm_config.cache_config
        dtypes: tuple[torch.dtype, ...] = MambaStateDtypeCalculator.mamba2_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )
        return dtypes

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        """Shapes of the convolution's window and of the state, of one sequence in one process."""
        config: HybridConfig = vllm_config.model_config.hf_config
        layout = served_layout(config)
        H, P = layout.num_heads, layout.head_dim
        return MambaStateShapeCalculator.mamba2_state_shape(
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            intermediate_size=H * P,
            n_groups=H,
            num_heads=H,
            head_dim=P,
            state_size=P,
            conv_kernel=config.conv_kernel,
            num_spec=vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How vLLM copies these states for its prefix cache."""
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()
