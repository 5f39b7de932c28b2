"""What the tests of speculation have in common."""

from __future__ import annotations

import pytest

from mambify.model import HybridForCausalLM
from speculating import model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    """A small Transformer, whose hybrids and cuts are targets and drafts."""
    return model(tmp_path_factory.mktemp("teacher"))
