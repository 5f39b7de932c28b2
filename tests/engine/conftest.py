"""What the tests of speculation have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambify.model import HybridForCausalLM
from mambify.ops.decode_linear import decode_linear
from speculating import model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    """A small Transformer, whose hybrids and cuts are targets and drafts."""
    return model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def products_by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every product of fused steps one of Triton's, in its interpreter; skips where there is a GPU."""

    def begin() -> None:
        if torch.cuda.is_available():
            pytest.skip("tests/engine/test_gpu_fused.py runs them on the GPU")

        def by_its_kernel(*given: Any, **settings: Any) -> Tensor:
            return decode_linear(*given, **settings | {"backend": "triton"})

        monkeypatch.setattr("mambify.engine.fused_parts.decode_linear", by_its_kernel)
        monkeypatch.setattr("mambify.ops.decode_linear.triton_rows.block_of", lambda *_, gated: 64)  # fewer programs
        monkeypatch.setattr("mambify.engine.tower.packs", lambda _: False)

    return begin
