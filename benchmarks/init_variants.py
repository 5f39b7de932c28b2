"""What calibration alone recovers from different first values: held-out KL of an untrained student, a line a variant.

    python benchmarks/init_variants.py --data quickstart/data

Runs on a CPU: 8,192 tokens of the data calibrate, three batches of four held-out blocks of 256 tokens score.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mambify.conversion import calibrate, convert
from mambify.data.documents import read_documents
from mambify.data.packing import pack
from mambify.distill.kd import KnowledgeDistiller, collate
from mambify.families.load import load, require_tokenizer
from mambify.mixers.initial import dt_bias_
from mambify.mixers.mamba2 import Mamba2Mixer

BLOCK, CALIBRATION_BLOCKS, HELDOUT_BATCHES = 256, 32, 3


def _rows(mixer: Mamba2Mixer) -> tuple[Tensor, ...]:
    """The parts z, x, B, C, dt of ``in_proj``."""
    inner = mixer.num_heads * mixer.head_dim
    return mixer.in_proj.weight.split([inner, *mixer.conv_split, mixer.num_heads], dim=0)


def _delta(low: float, high: float) -> Callable[[Mamba2Mixer], None]:
    return lambda mixer: void(dt_bias_(mixer.dt_bias, torch.Generator().manual_seed(1), low, high))


def _scaled(*parts: int, factor: float) -> Callable[[Mamba2Mixer], None]:
    return lambda mixer: void(*(_rows(mixer)[part].mul_(factor) for part in parts))


def void(*_: object) -> None:
    """Makes a statement of expressions."""


VARIANTS: dict[str, Callable[[Mamba2Mixer], None]] = {
    "identity": void,
    "D = 0": lambda mixer: void(mixer.D.zero_()),
    "Δ from 0.01 to 1": _delta(1e-2, 1.0),
    "A = -1": lambda mixer: void(mixer.A_log.zero_()),
    "A = -1, Δ from 0.01 to 0.5": lambda mixer: void(mixer.A_log.zero_(), _delta(1e-2, 0.5)(mixer)),
    "B and C × 0.25": _scaled(2, 3, factor=0.25),
    "B and C × 2": _scaled(2, 3, factor=2.0),
    "dt rows 0": _scaled(4, factor=0.0),
    "z rows × 3": _scaled(0, factor=3.0),
}


@torch.no_grad()
def main() -> None:
    """Converts, changes, calibrates and scores each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--attention", type=float, default=0.75)
    options = parser.parse_args()
    teacher = load(options.teacher)
    train, held = (
        pack(read_documents(options.data, require_tokenizer(teacher), split=split), BLOCK, seed=0)
        for split in ("train", "heldout")
    )
    calibration = train.input_ids()[:CALIBRATION_BLOCKS].split(8)
    batches = [collate([held[i] for i in range(4 * n, 4 * n + 4)]) for n in range(HELDOUT_BATCHES)]
    for name, change in VARIANTS.items():
        student = convert(teacher, attention=options.attention)
        for index in student.config.converted_layers:
            mixer = student.get_submodule(f"model.layers.{index}.mixer")
            assert isinstance(mixer, Mamba2Mixer)
            change(mixer)
        errors = calibrate(student, teacher.model, calibration)
        distiller = KnowledgeDistiller(student, teacher.model)
        count = torch.tensor(math.inf)  # the loss is not used
        found = [distiller(**batch, num_items=count).metrics for batch in batches]
        kl, agreement = (sum(float(m[key]) for m in found) / len(found) for key in ("kl", "top1_agreement"))
        error = sum(after for _, after in errors.values()) / len(errors)
        print(f"{name:28s} error {error:.4f}   KL {kl:.4f}   agreement {agreement:.1%}", flush=True)


if __name__ == "__main__":
    main()
