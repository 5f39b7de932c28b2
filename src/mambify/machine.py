"""The machine and the software on it, as reports and results name them."""

from __future__ import annotations

import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from mambify import __version__
from mambify.errors import InvalidOptionError


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(name: torch.device | str) -> torch.device:
    """The device of this name.

    Raises:
        InvalidOptionError: no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidOptionError(f"unknown device '{name}': choose cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOptionError(
            f"no device '{name}' here: this machine has {torch.cuda.device_count()} CUDA devices; cpu is always there"
        )
    return device


def device_name(device: str) -> str:
    """What the maker calls the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated there, those that torch holds and does not use among them; None if unknown."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    information = Path("/proc/meminfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


@cache
def memory_bandwidth(device: str) -> float:
    """Bytes a second that the device reads and writes while it copies what no cache holds; measured once."""
    on_gpu = torch.device(device).type == "cuda"
    source = torch.ones(2**28 if on_gpu else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit, as they stand beside every result."""
    return {
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "mambify": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+`` where it was edited; None elsewhere."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None
