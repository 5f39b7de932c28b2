"""Trains variants of a recipe on the same text and scores each: one row a variant, as JSON.

    python benchmarks/sweep.py recipes/smollm2-50-probe.yaml --data data/smollm2-chat --text wikitext2_test.txt \
        --out sweep.json --variants '{"base": [], "8k": ["stages.0.batch_tokens=8192", "stages.1.batch_tokens=8192"]}'

Scored are the first 64 blocks of 512 held-out tokens of the data, and of the text; seconds are those of the stages, the
recording of CUDA graphs and calibration included.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mambify.data.documents import read_documents
from mambify.data.packing import pack
from mambify.distill.losses import next_token_labels
from mambify.distill.recipe import load_recipe
from mambify.distill.run import summaries
from mambify.families.load import LoadedModel, load, require_tokenizer
from mambify.machine import default_device, device_name
from mambify.model import HybridForCausalLM
from mambify.ops.linear_kl import linear_kl
from mambify.workflows.distill import distill

BLOCKS, LENGTH = 64, 512


@torch.no_grad()
def score(student: HybridForCausalLM, teacher: HybridForCausalLM, blocks_NT: Tensor) -> dict[str, float]:
    """KL to the teacher, agreement, and both perplexities over blocks of text."""
    sums = dict.fromkeys(("kl", "ce", "teacher_ce", "agreement", "count"), 0.0)
    for ids in blocks_NT.split(8):
        ours = student.model(ids).last_hidden_state.flatten(0, 1)
        theirs = teacher.model(ids).last_hidden_state.flatten(0, 1)
        head, labels = teacher.lm_head.weight, next_token_labels(ids)
        part = linear_kl(ours, student.lm_head.weight, theirs, head, labels, ce_weight=1.0)
        itself = linear_kl(theirs, head, theirs, head, labels, ce_weight=1.0)
        for name, value in zip(sums, (part.kl, part.ce, itself.ce, part.agreement, part.num_positions), strict=True):
            sums[name] += float(value)
    count = sums["count"]
    return {
        "kl": sums["kl"] / count,
        "top1_agreement": sums["agreement"] / count,
        "perplexity": math.exp(sums["ce"] / count),
        "teacher_perplexity": math.exp(sums["teacher_ce"] / count),
        "perplexity_ratio": math.exp((sums["ce"] - sums["teacher_ce"]) / count),
    }


def texts(teacher: LoadedModel, data: str, text: str | None, device: str) -> dict[str, Tensor]:
    """What is scored: blocks ``[N, T]`` by name."""
    tokenizer = require_tokenizer(teacher)
    sources = {"held-out": pack(read_documents(data, tokenizer, split="heldout"), LENGTH, seed=0)}
    if text is not None:
        sources[Path(text).name] = pack(read_documents(text, tokenizer, split="all"), LENGTH, seed=0)
    return {name: blocks.input_ids()[:BLOCKS].to(device) for name, blocks in sources.items()}


def main() -> None:
    """Runs the sweep that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text")
    parser.add_argument("--out", required=True)
    parser.add_argument("--variants", default='{"recipe": []}')
    options = parser.parse_args()
    device = default_device()
    teacher = load(load_recipe(options.recipe).teacher)
    rows: list[dict[str, Any]] = []
    for name, overrides in json.loads(options.variants).items():
        run = tempfile.mkdtemp(prefix="sweep-")
        shared = [f"data.train={options.data}", f"data.heldout={options.data}", f"output={run}"]
        student, directory = distill(load_recipe(options.recipe, [*shared, *overrides]), device=device, teacher=teacher)
        teacher.model.to(device)
        student.to(device)
        done = summaries(directory)
        row = {
            "name": name,
            "overrides": overrides,
            "seconds": [stage["seconds"] for stage in done],
            "tokens": [stage["tokens"] for stage in done],
        }
        blocks = texts(teacher, options.data, options.text, device)
        row |= {where: score(student, teacher.model, ids) for where, ids in blocks.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(run)
        machine = {
            "device": device_name(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(options.out).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
