"""Where a model's weights lie: the engine reads them where they are, so they must all be at hand."""

from __future__ import annotations

import torch
from torch import nn

from mambify.errors import UnsupportedError

_NOWHERE = torch.device("meta")  # of weights that accelerate brings when their module is called


def is_spread(model: nn.Module) -> bool:
    """Whether weights lie on several devices, or some are only brought when they are needed (``device_map``)."""
    places = {parameter.device for parameter in model.parameters()}
    return len(places) > 1 or _NOWHERE in places


def require_one_place(model: nn.Module) -> None:
    """Raises UnsupportedError for a model that :func:`is_spread`."""
    if is_spread(model):
        raise UnsupportedError(
            "the weights of this model are spread by a device_map, and what decodes with slots or drafts needs them on "
            "one device: load it with mambify.load"
        )
