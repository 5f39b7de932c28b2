"""What every test shares: one CPU thread a process, no network, and the data folder beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch or a tokenizer is imported. One thread a worker: the suite is parallel over processes, and the
# sums of a one-thread run do not depend on the number of cores. No test may depend on a server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts beside the checkout; a test that wants it is skipped where it is absent."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data folder {path}, which is not part of the repository")
    return path
