"""What engines trip over in the config.json of a GraniteMoeHybrid model, rule by rule with the reason.

Each rule was met by running the engine or by reading how it takes the file apart: transformers 5.17 to 5.23, vLLM
0.33, SGLang 0.5.23, llama.cpp, TRL 1.16. A finding is ``broken`` where the engine refuses the model or gives other
logits, and ``limited`` where that holds for some versions or with some packages only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mambify.errors import UnsupportedError

ARCHITECTURE = "granitemoehybrid"
BROKEN, LIMITED = "broken", "limited"

#: what SGLang takes for a field that is absent
_SGLANG_DEFAULTS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "shared_intermediate_size": 8192,
}
_VLLM_ROPE = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
_CONV_MULTIPLE = 8


@dataclass(frozen=True)
class Finding:
    """One thing that an engine trips over.

    Attributes:
        engine: ``transformers``, ``vLLM``, ``SGLang``, ``llama.cpp`` or ``TRL``.
        field: of config.json.
        severity: ``broken`` or ``limited``.
        reason: what happens, and what to write instead.
    """

    engine: str
    field: str
    severity: str
    reason: str


def lint(config: Mapping[str, Any]) -> list[Finding]:
    """Findings about ``config``, the content of a config.json.

    Raises:
        UnsupportedError: it is of another architecture.
    """
    if config.get("model_type") != ARCHITECTURE:
        raise UnsupportedError(f"no rules for architecture '{config.get('model_type')}': known: {ARCHITECTURE}")
    return [finding for rule in _RULES for finding in rule(config)]


def tensor_parallel_sizes(config: Mapping[str, Any], most: int = 64) -> list[int]:
    """Over how many GPUs vLLM and SGLang can cut the layers of ``config``: what divides heads, groups and MLP."""
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    groups = config["mamba_n_groups"]
    divided = (heads, config["mamba_n_heads"], config["shared_intermediate_size"], *([groups] if groups > 1 else []))
    return [
        size
        for size in range(1, most + 1)
        if all(count % size == 0 for count in divided) and (keys % size == 0 or size % keys == 0)
    ]


def _widths(config: Mapping[str, Any]) -> Iterator[Finding]:
    expand, heads, dim = (config.get(name) for name in ("mamba_expand", "mamba_n_heads", "mamba_d_head"))
    if not isinstance(expand, int) or isinstance(expand, bool):
        reason = "is no integer, and has to be one: fill the mixer up with heads of zeros to a multiple of hidden_size"
        yield Finding("transformers", "mamba_expand", BROKEN, reason)
    elif isinstance(heads, int) and isinstance(dim, int) and heads * dim != expand * config["hidden_size"]:
        reason = f"{heads} heads of {dim} are not mamba_expand × hidden_size = {expand * config['hidden_size']}"
        yield Finding("transformers", "mamba_n_heads", BROKEN, reason)
    if not isinstance(dim, int):
        yield Finding("SGLang", "mamba_d_head", BROKEN, f"is {dim!r}, and is read as a number: write it out")
    if expand != 2:
        reason = (
            f"is {expand}: its graph has a mixer of twice the hidden size only; `mambify export --format gguf` fills "
            "it up, its own converter does not"
        )
        yield Finding("llama.cpp", "mamba_expand", BROKEN, reason)


def _attention_heads(config: Mapping[str, Any]) -> Iterator[Finding]:
    hidden, heads, dim = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    if hidden % heads or (dim is not None and dim * heads != hidden):
        for engine in ("vLLM", "SGLang"):
            reason = f"the head dimension is read as hidden_size / heads = {hidden} / {heads}, whatever head_dim says"
            yield Finding(engine, "num_attention_heads", BROKEN, reason)


def _layer_types(config: Mapping[str, Any]) -> Iterator[Finding]:
    kinds = config.get("layer_types")
    if not kinds:
        reason = "absent: every layer is then a Mamba layer to transformers, every sixth attention to SGLang"
        yield Finding("SGLang", "layer_types", BROKEN, reason)
        return
    if {"linear_attention", "full_attention"} & set(kinds):
        reason = "'mamba' and 'attention' are the names known before transformers 5.15; newer versions read both"
        yield Finding("vLLM", "layer_types", LIMITED, reason)
    if not {"attention", "full_attention"} & set(kinds):
        reason = "none is attention, and generation with a cache stops: it reads the cache's length off such a layer"
        yield Finding("transformers", "layer_types", BROKEN, reason)


def _norm(config: Mapping[str, Any]) -> Iterator[Finding]:
    version = str(config.get("transformers_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if config.get("mamba_n_groups", 1) > 1 and numbers < (5, 23):
        reason = (
            f"is {version}: before 5.23.0 the mixer's norm went over all groups at once, so the logits are others "
            "there; say 5.23.0"
        )
        yield Finding("transformers", "transformers_version", BROKEN, reason)


def _kernels(config: Mapping[str, Any]) -> Iterator[Finding]:
    heads, dim, groups, state = (config[f"mamba_{name}"] for name in ("n_heads", "d_head", "n_groups", "d_state"))
    if not isinstance(dim, int):
        return
    rows = 2 * heads * dim + 2 * groups * state + heads
    if rows % _CONV_MULTIPLE:
        reason = (
            f"with {heads} heads in_proj has {rows} rows, and the kernel of the package causal-conv1d takes a multiple "
            f"of {_CONV_MULTIPLE} only: export with --split-heads, or run without that package"
        )
        yield Finding("transformers", "mamba_n_heads", LIMITED, reason)
    if not 2 <= config.get("mamba_d_conv", 4) <= 4:
        reason = "the kernel of the package causal-conv1d takes widths from 2 to 4 only"
        yield Finding("transformers", "mamba_d_conv", LIMITED, reason)


def _infinity(config: Mapping[str, Any]) -> Iterator[Finding]:
    if "time_step_limit" in config:
        reason = "JSON has no infinity, and what stands for it is misread: leave the field out, no limit is the default"
        yield Finding("vLLM", "time_step_limit", LIMITED, reason)


def _rope(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("position_embedding_type") != "rope":
        return
    if "rope_theta" not in config:
        reason = "is read at the top level only, and is 10000 where absent: write it beside rope_parameters"
        yield Finding("SGLang", "rope_theta", BROKEN, reason)
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind not in _VLLM_ROPE:
        yield Finding("vLLM", "rope_parameters", BROKEN, f"rope_type '{kind}' is unknown there")


def _absent(config: Mapping[str, Any]) -> Iterator[Finding]:
    for field, default in _SGLANG_DEFAULTS.items():
        if field not in config:
            yield Finding("SGLang", field, BROKEN, f"absent, and then taken as {default}: write it out")


def _activation(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("hidden_act", "silu") != "silu":
        yield Finding("vLLM", "hidden_act", BROKEN, f"is {config['hidden_act']}; only silu is taken")


def _router(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("num_local_experts"):
        return
    for field, default in (("router_aux_loss_coef", 0.001), ("output_router_logits", False)):
        if config.get(field, default):
            reason = "makes trainers ask for a router's logits, which a model without experts has not: write 0.0, false"
            yield Finding("TRL", field, BROKEN, reason)


_RULES: tuple[Callable[[Mapping[str, Any]], Iterator[Finding]], ...] = (
    _widths,
    _attention_heads,
    _layer_types,
    _norm,
    _kernels,
    _infinity,
    _rope,
    _absent,
    _activation,
    _router,
)
