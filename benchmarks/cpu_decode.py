"""How fast a hybrid and its teacher decode on a CPU: llama.cpp, stock transformers and mambify, by context length.

    python benchmarks/cpu_decode.py runs/half/student --teacher smollm2 --contexts 256,8192,32768 --json cpu_decode.json

Batch 1, a new process for each row, and the peak of its resident memory over what it had before it loaded the model:
libraries are not counted; weights, buffers and whatever loading needed for a moment are. llama.cpp reads the whole
context, in its own defaults (keys and values in float16); torch's models get (most of) their keys and values as random
numbers, because decoding takes the same time whatever they are. So only llama.cpp has a figure for reading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = 256


class Case(NamedTuple):
    """One row: what runs which model in which dtype after how many tokens."""

    engine: str
    model: str
    dtype: str
    path: str
    context: int


def main() -> None:
    """Makes the files, measures every case in a process of its own, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--contexts", default="256,8192,32768")
    parser.add_argument("--engines", default="llama.cpp,transformers,mambify")
    parser.add_argument("--gguf-dtypes", default="f32,q8_0,q4_0")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = Case(*json.loads(arguments.case))
        print(json.dumps(RUNNERS[case.engine](case, arguments.new_tokens, arguments.threads)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        files = make_files(arguments, Path(directory))
        for case in cases(files, arguments):
            command = [sys.executable, __file__, "--case", json.dumps(case)]
            command += ["--new-tokens", str(arguments.new_tokens), "--threads", str(arguments.threads)]
            load = os.getloadavg()[0]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(case._asdict() | {"path": Path(case.path).name, "load_average": load} | json.loads(done.stdout))
            print(line(rows[-1]), flush=True)
    if arguments.json is not None:
        from mambify.io import write_json
        from mambify.machine import environment

        machine = environment("cpu") | {"num_threads": arguments.threads}
        write_json(arguments.json, {"benchmark": "cpu_decode", "machine": machine, "results": rows})


def make_files(arguments: argparse.Namespace, directory: Path) -> dict[tuple[str, str, str], str]:
    """(engine, model, dtype) → what is loaded; made once, so that no measured process converts anything."""
    import mambify
    from mambify.export import export_gguf, export_transformers
    from mambify.families.load import require_tokenizer
    from mambify.families.sources import resolve

    files = {}
    engines = arguments.engines.split(",")
    for name, source in (("hybrid", arguments.model), ("teacher", arguments.teacher)):
        loaded = mambify.load(source, dtype="float32")
        if "llama.cpp" in engines:
            for dtype in arguments.gguf_dtypes.split(","):
                path = directory / f"{name}-{dtype}.gguf"
                export_gguf(loaded.model, require_tokenizer(loaded), path, dtype=dtype)
                files["llama.cpp", name, dtype] = str(path)
        if "mambify" in engines:
            files["mambify", name, "float32"] = source
        if "transformers" in engines and name == "hybrid":
            export_transformers(loaded.model, directory / name)
            files["transformers", name, "float32"] = str(directory / name)
        elif "transformers" in engines:
            where = resolve(source)
            files["transformers", name, "float32"] = str(where.directory / (where.gguf or ""))
    return files


def cases(files: dict[tuple[str, str, str], str], arguments: argparse.Namespace) -> Iterator[Case]:
    """Every row of the table, short contexts first."""
    for context in map(int, arguments.contexts.split(",")):
        for (engine, model, dtype), path in files.items():
            yield Case(engine, model, dtype, path, context)


def run_llama_cpp(case: Case, new_tokens: int, threads: int) -> dict[str, float]:
    """llama.cpp through its C interface."""
    from mambify.bench.llama_cpp import LlamaCpp

    context_length, before = case.context + new_tokens + 8, memory("VmRSS")
    with LlamaCpp(case.path, context_length=context_length, threads=threads, exact=False) as llama:
        began = time.perf_counter()
        token = int(llama.read([10 + i % 997 for i in range(case.context)]).argmax())
        reading = time.perf_counter() - began

        def step(token: int) -> int:
            return int(llama.read([token]).argmax())

        return figures(step, token, new_tokens, before) | {"read_tokens_per_second": case.context / reading}


def run_transformers(case: Case, new_tokens: int, threads: int) -> dict[str, float]:
    """The stock class, in a process that never imports this package."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    torch.set_num_threads(threads)
    path, before = Path(case.path), memory("VmRSS")
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
        )
        model = model.float()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return run_torch(model.eval(), case, new_tokens, before)


def run_mambify(case: Case, new_tokens: int, threads: int) -> dict[str, float]:
    """Our own model in the engine that ``mambify generate`` runs, its slots filled as if it had read the context."""
    import torch

    import mambify
    from mambify.engine import Sampling, Speculator

    torch.set_num_threads(threads)
    before = memory("VmRSS")
    model = mambify.load(case.path, dtype="float32", with_tokenizer=False).model
    engine = Speculator(
        model, None, num_slots=1, max_length=case.context + new_tokens + 8, sampling=Sampling(temperature=0.0)
    )
    decode = engine.pretend(case.context)

    def step(token: int) -> int:
        decode()
        return token

    with torch.inference_mode():
        return figures(step, 0, new_tokens, before)


def run_torch(model: Any, case: Case, new_tokens: int, before: int) -> dict[str, float]:
    """Reads a prefix, fills the keys and values up, decodes."""
    import torch

    with torch.no_grad():
        prefix = torch.arange(10, 10 + min(PREFIX, case.context))[None]
        output = model(input_ids=prefix, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                B, G, _, P = layer.keys.shape
                layer.keys, layer.values = (torch.randn(B, G, case.context, P) for _ in range(2))

        def step(token: int) -> int:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(output.logits[0, -1].argmax())

        return figures(step, int(output.logits[0, -1].argmax()), new_tokens, before)


def figures(step: Callable[[int], int], token: int, new_tokens: int, before: int) -> dict[str, float]:
    """Tokens a second by the median step, two that warm up aside, and the peak of memory over ``before``."""
    times = []
    for _ in range(new_tokens):
        began = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - began)
    times = sorted(times[2:])
    return {"tokens_per_second": 1 / times[len(times) // 2], "peak_bytes": memory("VmHWM") - before}


def memory(field: str) -> int:
    """Resident bytes of this process, now (``VmRSS``) or at most (``VmHWM``; ``ru_maxrss`` counts its parent's too)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field))
    return int(kilobytes) * 1024


RUNNERS: dict[str, Callable[[Case, int, int], dict[str, float]]] = {
    "llama.cpp": run_llama_cpp,
    "transformers": run_transformers,
    "mambify": run_mambify,
}


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    reading = row.get("read_tokens_per_second")
    text = f"{row['context']:>6} {row['engine']:13}{row['model']:8} {row['dtype']:8} "
    text += f"{row['tokens_per_second']:7.1f} tokens/s {row['peak_bytes'] / 1e6:7.0f} MB"
    return text + (f"  reads {reading:6.0f} tokens/s" if reading else "")


if __name__ == "__main__":
    main()
