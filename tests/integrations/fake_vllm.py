"""The few classes of vLLM that the plugin builds a model of, for one process, one sequence and no cache.

They have vLLM's names, arguments and weight loaders (those of 0.33), and compute in plain torch. So what the plugin
itself does is tested: which layer gets what, where each weight goes, how projections are cut.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GraniteMoeHybridConfig, LlamaConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
    GraniteMoeHybridRMSNormGated,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

#: whether transformers' layer, which stands in for vLLM's, norms each head by itself as that one does
HAS_GROUP_NORM = "group_size" in inspect.signature(GraniteMoeHybridRMSNormGated).parameters


class Linear(nn.Module):
    """A projection that gives (output, no bias left to add); stacked ones take their parts one by one."""

    def __init__(self, inputs: int, sizes: dict[Any, int], *, bias: bool, **_: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.full((sum(sizes.values()), inputs), torch.nan))
        self.weight.weight_loader = self.load
        self.bias = nn.Parameter(torch.full((sum(sizes.values()),), torch.nan)) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = self.load

    def load(self, parameter: nn.Parameter, loaded: Tensor, part: Any = None) -> None:
        rows = parameter.data
        if part is not None:
            before = list(self.sizes)[: list(self.sizes).index(part)]
            rows = rows.narrow(0, sum(self.sizes[name] for name in before), self.sizes[part])
        assert rows.shape == loaded.shape
        rows.copy_(loaded)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return functional.linear(x, self.weight, self.bias), None


class QKVParallelLinear(Linear):
    def __init__(self, hidden_size: int, head_size: int, heads: int, groups: int, *, bias: bool, **_: Any) -> None:
        super().__init__(
            hidden_size, {"q": heads * head_size, "k": groups * head_size, "v": groups * head_size}, bias=bias
        )


class RowParallelLinear(Linear):
    def __init__(self, input_size: int, output_size: int, *, bias: bool, **_: Any) -> None:
        super().__init__(input_size, {None: output_size}, bias=bias)


class LlamaMLP(nn.Module):
    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool, **_: Any) -> None:
        super().__init__()
        assert hidden_act == "silu"
        self.gate_up_proj = Linear(hidden_size, {0: intermediate_size, 1: intermediate_size}, bias=bias)
        self.down_proj = Linear(intermediate_size, {None: hidden_size}, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)[0]


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)


class Attention(nn.Module):
    def __init__(self, heads: int, head_size: int, scale: float, *, num_kv_heads: int, prefix: str, **_: Any) -> None:
        super().__init__()
        self.shape, self.groups, self.scale = (heads, head_size), num_kv_heads, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, size = self.shape
        q, k, v = (x.view(len(x), -1, size).transpose(0, 1)[None] for x in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return y[0].transpose(0, 1).reshape(-1, heads * size)


def get_rope(head_size: int, max_position: int, rope_parameters: dict[str, Any]) -> Callable[..., Any]:
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=max_position, rope_parameters=rope_parameters)
    embedding = LlamaRotaryEmbedding(config)

    def rotate(positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = embedding(q, positions[None])
        heads = [x.view(1, len(x), -1, head_size) for x in (q, k)]
        turned = apply_rotary_pos_emb(*heads, cos, sin, unsqueeze_dim=2)
        return turned[0].reshape(q.shape), turned[1].reshape(k.shape)

    return rotate


class MambaMixer2(nn.Module):
    """transformers' stock layer with vLLM's parameter ``A`` = -exp(A_log), set as it is loaded."""

    def __init__(
        self,
        *,
        hidden_size: int,
        ssm_state_size: int,
        conv_kernel_size: int,
        intermediate_size: int,
        use_conv_bias: bool,
        use_bias: bool,
        n_groups: int,
        num_heads: int,
        head_dim: int,
        rms_norm_eps: float,
        activation: str,
        prefix: str,
        **_: Any,
    ) -> None:
        super().__init__()
        config = GraniteMoeHybridConfig(
            hidden_size=hidden_size,
            num_hidden_layers=1,
            layer_types=["mamba"],
            mamba_n_heads=num_heads,
            mamba_n_groups=n_groups,
            mamba_d_state=ssm_state_size,
            mamba_d_head=head_dim,
            mamba_d_conv=conv_kernel_size,
            mamba_expand=intermediate_size // hidden_size,
            mamba_proj_bias=use_bias,
            mamba_conv_bias=use_conv_bias,
            mamba_chunk_size=8,
            rms_norm_eps=rms_norm_eps,
            hidden_act=activation,
        )
        layer = GraniteMoeHybridMambaLayer(config, 0)
        for name in ("in_proj", "conv1d", "norm", "out_proj", "D", "dt_bias"):
            setattr(self, name, getattr(layer, name))
        self.A = nn.Parameter(torch.full((num_heads,), torch.nan))
        self.A.weight_loader = lambda parameter, loaded: parameter.data.copy_(-loaded.exp())
        self._layer = (layer,)  # not a submodule: its parameters are those above

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self._layer
        layer.A_log = nn.Parameter(torch.log(-self.A))
        return layer(x[None])[0]


class Embedding(nn.Embedding):
    def __init__(self, tokens: int, size: int, **_: Any) -> None:
        super().__init__(tokens, size)

    def tie_weights(self, other: nn.Module) -> nn.Module:
        return other


class LogitsProcessor(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()

    def forward(self, head: nn.Module, x: Tensor) -> Tensor:
        return functional.linear(x, head.weight)


def support_torch_compile(*, dynamic_arg_dims: dict[str, int]) -> Callable[[type], type]:
    return lambda cls: cls


def default_weight_loader(parameter: nn.Parameter, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


class MambaStateShapeCalculator:
    @classmethod
    def mamba2_state_shape(cls, **sizes: int) -> dict[str, int]:
        return sizes


_CONTENTS: dict[str, dict[str, Any]] = {
    "compilation.decorators": {"support_torch_compile": support_torch_compile},
    "config": {"CacheConfig": object, "ModelConfig": object, "VllmConfig": object},
    "distributed": {"get_tensor_model_parallel_world_size": lambda: 1},
    "model_executor.layers.attention": {"Attention": Attention},
    "model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
    "model_executor.layers.linear": {"QKVParallelLinear": QKVParallelLinear, "RowParallelLinear": RowParallelLinear},
    "model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "model_executor.layers.mamba.mamba_mixer2": {"MambaMixer2": MambaMixer2},
    "model_executor.layers.mamba.mamba_utils": {
        "MambaStateCopyFuncCalculator": object,
        "MambaStateDtypeCalculator": object,
        "MambaStateShapeCalculator": MambaStateShapeCalculator,
    },
    "model_executor.layers.quantization": {"QuantizationConfig": object},
    "model_executor.layers.rotary_embedding": {"get_rope": get_rope},
    "model_executor.layers.vocab_parallel_embedding": dict.fromkeys(
        ("ParallelLMHead", "VocabParallelEmbedding"), Embedding
    ),
    "model_executor.model_loader.weight_utils": {"default_weight_loader": default_weight_loader},
    "model_executor.models.interfaces": {
        "HasInnerState": type("HasInnerState", (), {}),
        "IsHybrid": type("IsHybrid", (), {}),
    },
    "model_executor.models.llama": {"LlamaMLP": LlamaMLP},
    "model_executor.models.utils": {"maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name},
}


class Registry:
    """What plugins registered."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, architecture: str, model: str) -> None:
        self.models[architecture] = model


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Makes ``import vllm`` give this, until the test ends."""
    registry = Registry()

    def module(name: str, contents: dict[str, Any]) -> None:
        made = ModuleType(name)
        made.__path__ = []
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm", {"ModelRegistry": registry})
    for name, contents in _CONTENTS.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            if (parent := "vllm." + ".".join(parts[:length])) not in sys.modules:
                module(parent, {})
        module(f"vllm.{name}", contents)
    monkeypatch.delitem(sys.modules, "mambify.integrations.vllm.model", raising=False)
    return registry


def vllm_config(hf_config: Any, sizes: Sequence[int] = (1, 0)) -> Any:
    """What vLLM hands to a model's constructor, as far as the plugin reads it."""
    ranks, num_spec = sizes
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, dtype=torch.float32),
        cache_config=None,
        quant_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        num_speculative_tokens=num_spec,
    )
