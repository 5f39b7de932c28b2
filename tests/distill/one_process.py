"""One of several processes: runs the jobs of a JSON file in turn, as ``torchrun`` starts it.

What became of each goes to ``FILE.RANK.json``. A job is either the arguments of the command, or

    recipe       a file
    sharded      whether weights are spread over the processes
    device       cpu unless told otherwise
    environment  what else is to be in it
    break_off    [stage, step] at which the run stops, as if it had been killed
    spoil        [rank, stage, step] at which one process's weights become NaN
    full_disk    how many files can be written before the first process's disk is full
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mambify.cli.main import main as command
from mambify.distill import checkpoints
from mambify.distill.checkpoints import trained_parameters
from mambify.distill.recipe import load_recipe
from mambify.distill.trainer import StageTrainer
from mambify.workflows.distill import distill

RANK = int(os.environ["RANK"])


class BrokenOff(Exception):
    """The run stopped where the job said."""


def main(path: Path) -> None:
    outcomes = [_command(job) if "command" in job else _run(job) for job in json.loads(path.read_text("utf-8"))]
    path.with_suffix(f".{RANK}.json").write_text(json.dumps(outcomes), encoding="utf-8")


def _command(job: dict[str, Any]) -> dict[str, Any]:
    return {"status": command(job["command"])}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    sharding = {"ACCELERATE_USE_FSDP": str(job.get("sharded", False)).lower(), "FSDP_VERSION": "2"}
    os.environ |= sharding | {"FSDP_OFFLOAD_PARAMS": "false"} | job.get("environment", {})
    step, save = StageTrainer.training_step, checkpoints.save_file
    held: list[float] = []
    saved = 0

    def watched(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        parameters = list(self.model.parameters())
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
        held.append(local / sum(p.numel() for p in parameters))
        at = [Path(self.args.output_dir).name, self.state.global_step]
        if at == job.get("break_off"):
            raise BrokenOff
        if [RANK, *at] == job.get("spoil"):
            next(iter(trained_parameters(self.model).values())).data.fill_(torch.nan)
        return step(self, *args, **kwargs)

    def limited(*args: Any, **kwargs: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > job["full_disk"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    StageTrainer.training_step = watched  # type: ignore[method-assign]
    if "full_disk" in job and RANK == 0:
        checkpoints.save_file = limited
    try:
        distill(load_recipe(job["recipe"]), device=job.get("device", "cpu"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "held": held}
    finally:
        StageTrainer.training_step = step  # type: ignore[method-assign]
        checkpoints.save_file = save
    return {"held": held}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    main(Path(sys.argv[1]))
