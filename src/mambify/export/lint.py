"""What engines trip over in the config.json of a GraniteMoeHybrid or Bamba model, rule by rule with the reason.

Each rule was met by running the engine or by reading how it reads the file; docs/export.md says which. A finding is
``broken`` where the engine refuses the model or gives other logits, and ``costly`` where it is only slower or larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("granitemoehybrid",)


@dataclass(frozen=True)
class Finding:
    """One thing that an engine trips over.

    Attributes:
        engine: ``transformers``, ``vLLM``, ``SGLang``, ``llama.cpp`` or ``TRL``.
        field: of config.json.
        severity: ``broken`` or ``costly``.
        reason: what happens, and what to write instead.
    """

    engine: str
    field: str
    severity: str
    reason: str


def lint(config: Mapping[str, Any]) -> list[Finding]:
    """Findings about ``config``, the content of a config.json of an architecture in :data:`ARCHITECTURES`."""
    return [*_of_layers(config), *_of_mixer(config), *_of_rope(config), *_of_training(config)]


def _of_layers(config: Mapping[str, Any]) -> Iterator[Finding]:
    kinds = set(config.get("layer_types") or ())
    if kinds & {"linear_attention", "full_attention"}:
        reason = "only the names 'mamba' and 'attention' are known in layer_types; transformers reads these as well"
        yield Finding("vLLM", "layer_types", "broken", reason)


def _of_mixer(config: Mapping[str, Any]) -> Iterator[Finding]:
    if not isinstance(config.get("mamba_expand", 2), int):
        yield Finding("transformers", "mamba_expand", "broken", "has to be an integer: pad the mixer with zero heads")
    if "time_step_limit" in config:
        reason = "JSON has no infinity: leave the field out, the default is no limit"
        yield Finding("transformers", "time_step_limit", "broken", reason)


def _of_rope(config: Mapping[str, Any]) -> Iterator[Finding]:
    if config.get("position_embedding_type") == "rope" and "rope_theta" not in config:
        reason = "is read at the top level only, and is 10000 where absent: write it beside rope_parameters"
        yield Finding("SGLang", "rope_theta", "broken", reason)


def _of_training(config: Mapping[str, Any]) -> Iterator[Finding]:
    if not config.get("num_local_experts") and config.get("router_aux_loss_coef", 0.001):
        reason = "anything but 0.0 makes trainers ask for the router's logits, and a model without experts has none"
        yield Finding("TRL", "router_aux_loss_coef", "broken", reason)
