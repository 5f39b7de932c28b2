"""The argument ``backend=`` and the check of shapes, on every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, ones, zeros

from mambify.errors import InvalidOptionError
from mambify.ops.backends import documents
from mambify.ops.causal_conv import causal_conv, causal_conv_step
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.selective_scan import selective_scan, selective_scan_step
from mambify.ops.ssd import ssd_scan, ssd_step

BTGP, BTH, BTHP = (1, 4, 1, 3), (1, 4, 2), (1, 4, 2, 3)
CALLS: dict[str, tuple[Callable[..., object], list[Tensor | None]]] = {
    "ssd_scan": (ssd_scan, [ones(BTGP), ones(BTH), -ones(2), ones(BTGP), ones(BTHP), ones(2)]),
    "ssd_step": (
        ssd_step,
        [ones(1, 1, 3), ones(1, 2), -ones(2), ones(1, 1, 3), ones(1, 2, 3), None, zeros(1, 2, 3, 3)],
    ),
    "selective_scan": (
        selective_scan,
        [ones(BTHP), ones(BTHP), -ones(2, 3, 5), ones(1, 4, 2, 5), ones(1, 4, 2, 5), ones(2, 3)],
    ),
    "selective_scan_step": (
        selective_scan_step,
        [ones(1, 2, 3), ones(1, 2, 3), -ones(2, 3, 5), ones(1, 2, 5), ones(1, 2, 5), None, zeros(1, 2, 3, 5)],
    ),
    "causal_conv": (causal_conv, [ones(1, 4, 6), ones(6, 4), ones(6)]),
    "causal_conv_step": (causal_conv_step, [ones(1, 6), ones(6, 4), None, zeros(1, 6, 3)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_backend_by_name(name: str) -> None:
    function, inputs = CALLS[name]
    chosen, named = function(*inputs), function(*inputs, backend="reference")
    assert isinstance(chosen, tuple) and isinstance(named, tuple)
    assert all(torch.equal(a, b) for a, b in zip(chosen, named, strict=True))
    with pytest.raises(InvalidOptionError, match=r"'refrence'.*did you mean 'reference'.*known: auto, reference"):
        function(*inputs, backend="refrence")


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_is_refused(name: str) -> None:
    function, inputs = CALLS[name]
    for place, tensor in enumerate(inputs):
        if tensor is None or place == 0:
            continue
        wrong = [*inputs[:place], torch.cat([tensor, tensor]), *inputs[place + 1 :]]
        with pytest.raises(ValueError, match="shape"):
            function(*wrong)


def test_gated_norm_backend_and_shapes() -> None:
    y = ones(BTHP)
    with pytest.raises(InvalidOptionError, match=r"no backend 'cuda' here; known: auto, reference(, triton)?$"):
        gated_rms_norm(y, y, ones(2, 3), 1e-5, "cuda")
    with pytest.raises(ValueError, match="weight_HP"):
        gated_rms_norm(y, y, ones(1, 3), 1e-5)


@pytest.mark.parametrize("scan", ["ssd_scan", "selective_scan"])
def test_chunk_size_below_one(scan: str) -> None:
    function, inputs = CALLS[scan]
    with pytest.raises(InvalidOptionError, match="chunk_size must be at least 1, got 0"):
        function(*inputs, chunk_size=0)


def test_heads_that_groups_do_not_divide() -> None:
    x = ones(1, 4, 2, 3)
    with pytest.raises(ValueError, match="G=2, H=3"):
        ssd_scan(x, ones(1, 4, 3), -ones(3), x, ones(1, 4, 3, 3))


def test_documents_count_changes_and_not_ids() -> None:
    ids = torch.tensor([[7, 7, 3, 7, 7], [0, 1, 1, 1, 2]])
    assert documents(ids).tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]]
