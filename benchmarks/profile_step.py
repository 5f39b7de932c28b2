"""Where the time of a training step goes: its kernels by the device time they take.

    python benchmarks/profile_step.py kd 135M --context 512 --sequences 32

The step is the one that ``mambify bench train`` measures, run without a recorded graph so that kernels keep their
names.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from mambify.bench import train
from mambify.distill.parallel import Processes


def main() -> None:
    """Profiles one step of the case on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["align", "kd"])
    parser.add_argument("shape", choices=list(train.SHAPES))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--mixer", default="mamba2")
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--top", type=int, default=45)
    given = parser.parse_args()
    case = train.Case(
        "profile", given.stage, given.shape, given.context, given.sequences, mixer=given.mixer, ops=given.ops
    )
    step, flops = train.build_step(case, Processes(device="cuda"), graph=False)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        times[event.name] += event.self_device_time_total
        counts[event.name] += 1
    whole = times.total()
    assert flops is not None  # one process shards nothing
    print(f"{whole / 1e3:.1f} ms on the device in {counts.total()} kernels; {flops / whole / 1e6:.0f} TFLOP/s")
    for name, microseconds in times.most_common(given.top):
        print(f"{microseconds / 1e3:8.2f} ms {microseconds / whole:6.1%} {counts[name]:6d} x  {name[:150]}")


if __name__ == "__main__":
    main()
