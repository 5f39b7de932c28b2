"""Models that PEFT has wrapped."""

from __future__ import annotations

import sys
from typing import TypeVar

Model = TypeVar("Model")


def unwrapped(model: Model) -> Model:
    """The model in PEFT's wrapper, with its LoRA layers in place: it says what the wrapper says.

    Anything else is given back as it is; so are adapters that need the wrapper's own ``forward``, such as prompts, and
    LoRA layers that wait for tokens that invoke them.
    """
    peft = sys.modules.get("peft")  # who has such a model has imported it
    if peft is None or not isinstance(model, peft.PeftModel) or type(model.base_model) is not peft.LoraModel:
        return model
    if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
        return model
    inner: Model = model.base_model.model
    return inner
