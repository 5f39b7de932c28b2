"""What the stock architectures of attention and Mamba2 layers share: their facts as ours, their weights as ours.

Our Mamba2 mixer is the stock one with a state-space group and a norm for each head, and a state as wide as a head. What
is not of that kind is refused with the field that says so. What mambify exported carries, in the field ``mambify`` of
its config.json, what its teacher was and which heads are real.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from mambify.config import ATTENTION, HybridConfig
from mambify.errors import CheckpointError, UnsupportedError
from mambify.families.base import ReadWeights
from mambify.families.granite_layout import GraniteLayout, require_zeros

#: key of config.json under which an export says what it was made from
OWN = "mambify"
_OWN_FACTS = (
    "qk_norm",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "attention_output_bias",
    "rope_parameters",
    "teacher_family",
    "teacher",
    "teacher_hub_id",
    "teacher_license",
)


def own_facts(config: HybridConfig, layout: GraniteLayout) -> dict[str, Any]:
    """What an export says under :data:`OWN`."""
    return {name: getattr(config, name) for name in _OWN_FACTS} | {"inert_layers": layout.inert_layers}


def require_values(config: PreTrainedConfig, **allowed: tuple[Any, ...]) -> None:
    """Raises UnsupportedError for the first field that is none of what it may be."""
    for field, values in allowed.items():
        value = getattr(config, field, None)
        if value not in values:
            wanted = " or ".join(str(value) for value in values if value is not None)
            raise UnsupportedError(
                f"{field} is {value} in config.json of this {config.model_type}; mambify's mixers cover {wanted} only"
            )


def hybrid_facts(config: PreTrainedConfig, *, attention_scale: float | None) -> dict[str, Any]:
    """The fields of HybridConfig that a stock config of attention and Mamba2 layers gives.

    Args:
        attention_scale: what the scores are multiplied by; ``None`` where it is 1/√P.

    Raises:
        UnsupportedError: our mixers do not cover it; names the field.
    """
    mixers = [ATTENTION if kind == "full_attention" else "mamba2" for kind in config.layer_types]
    own = getattr(config, OWN, None)
    facts = dict(own) if isinstance(own, dict) else _facts_of_others(config, mixers)
    try:
        inert = facts.pop("inert_layers")
        num_layers = config.num_hidden_layers - inert
        scale, rope = facts["head_dim"] ** -0.5, facts["rope_parameters"] or {}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the field '{OWN}' of config.json is not as mambify writes it: {error!r}") from error
    if ATTENTION in mixers[:num_layers] and attention_scale is not None and not math.isclose(attention_scale, scale):
        raise UnsupportedError(f"attention_multiplier is {attention_scale}; mambify's attention has {scale:.6g} only")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}; mambify rotates whole heads (1.0) only"
        )
    require_values(config, hidden_act=("silu", "swish"), time_step_limit=((0.0, math.inf), None))
    return facts | {
        "num_hidden_layers": num_layers,
        "layer_mixers": mixers[:num_layers],
        "layer_types": ["full_attention"] * num_layers,
        "conv_kernel": config.mamba_d_conv,
    }


def _facts_of_others(config: PreTrainedConfig, mixers: list[str]) -> dict[str, Any]:
    """Head counts and biases of a config that mambify did not write."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads
    if ATTENTION in mixers and hasattr(config, "head_dim"):
        require_values(config, head_dim=(None, head_dim))
    if "mamba2" in mixers:
        width = config.mamba_n_heads // config.mamba_n_groups * config.mamba_d_head
        if width != config.mamba_d_state:
            raise UnsupportedError(
                f"mamba_n_groups is {config.mamba_n_groups} here: {width} channels "
                f"share a norm and a state of {config.mamba_d_state}; mambify's Mamba2 has as many channels as state, "
                "a group and a norm for each head"
            )
        if ATTENTION in mixers:
            require_values(config, mamba_n_groups=(heads,), mamba_d_state=(head_dim,))
        else:
            heads = groups = config.mamba_n_groups
            head_dim = config.mamba_d_state
    biased_mixer = "mamba2" in mixers and config.mamba_proj_bias
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias or biased_mixer,
        "rope_parameters": config.rope_parameters,
        "inert_layers": 0,
    }


@dataclass(frozen=True)
class StockNames:
    """Where a stock architecture has other names than ours outside of the mixers.

    Attributes:
        renames: regular expressions, stock name → ours, applied in order; ``gate_up`` is cut into two.
    """

    renames: tuple[tuple[str, str], ...]


def read_as_ours(config: PreTrainedConfig, own: HybridConfig, read: ReadWeights, names: StockNames) -> ReadWeights:
    """A reader of the stock weights that gives ours.

    Args:
        config, own: the stock configuration and what became of it.
        read: gives the stored weights by their stock names.
    """
    layout = _layout(config, own)
    assert own.layer_mixers
    mixers = own.layer_mixers

    def convert(stored: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        found = re.match(r"(model\.layers\.(\d+)\.)(mamba|self_attn)\.(.*)", stored)
        inert = re.match(r"model\.layers\.(\d+)\.(.*)", stored)
        if inert is not None and int(inert[1]) >= len(mixers):
            if inert[2] in ("self_attn.o_proj.weight", "shared_mlp.output_linear.weight"):
                require_zeros(tensor, f"the layer {inert[1]} that does nothing")
            return
        if found is None:
            yield from _outside_of_mixers(stored, tensor, names)
            return
        unfold = layout.unfold_mamba2 if found[3] == "mamba" else layout.unfold_attention
        try:
            for name, value in unfold(found[4], tensor):
                yield f"{found[1]}mixer.{name}", value
        except CheckpointError as error:
            raise CheckpointError(f"'{stored}': {error}") from error

    def read_own(wanted: Any) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in read(lambda _: True):
            yield from ((name, value) for name, value in convert(stored, tensor) if wanted(name))

    return read_own


def _outside_of_mixers(stored: str, tensor: Tensor, names: StockNames) -> Iterator[tuple[str, Tensor]]:
    name = stored
    for pattern, replacement in names.renames:
        name = re.sub(pattern, replacement, name)
    if ".gate_up." not in name:
        yield name, tensor
        return
    gate, up = tensor.chunk(2)
    yield name.replace("gate_up", "gate_proj"), gate
    yield name.replace("gate_up", "up_proj"), up


def _layout(config: PreTrainedConfig, own: HybridConfig) -> GraniteLayout:
    """The layout that the stock weights have.

    Raises:
        CheckpointError: the sizes of the stock configuration are not those in which this hybrid is written.
    """
    layout = replace(
        GraniteLayout.of(own),
        attention_heads=config.num_attention_heads,
        attention_groups=config.num_key_value_heads,
        attention_bias=config.attention_bias,
        mixer_bias=config.mamba_proj_bias,
        conv_bias=config.mamba_conv_bias,
    )
    if "mamba2" in (own.layer_mixers or ()):
        groups = config.mamba_n_groups
        layout = replace(layout, stock_heads=groups, split=config.mamba_n_heads // groups)
    assert own.head_dim
    if layout.stock_heads < layout.num_heads or (own.attention_layers and layout.attention_dim < own.head_dim):
        raise CheckpointError(f"the field '{OWN}' of config.json speaks of more or larger heads than there are")
    return layout
