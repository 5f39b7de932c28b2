"""A process without mambify: loads an export with stock transformers and answers prompts greedily.

    python clean_process.py DIRECTORY JOB.json      the answers go to stdout as JSON

JOB.json has ``prompts``, ``max_new_tokens``, and ``chat``: whether prompts go through the chat template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class Blocker(MetaPathFinder):
    """Stands before every other finder and lets nobody import mambify."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "mambify":
            raise ImportError("mambify is not to be had here")
        return None


def main(directory: str, job_file: str) -> None:
    sys.meta_path.insert(0, Blocker())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    answers = []
    for prompt in job["prompts"]:
        if job["chat"]:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=job["max_new_tokens"])
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    try:
        import mambify  # noqa: F401
    except ImportError:
        blocked = True
    else:
        blocked = False
    json.dump({"answers": answers, "class": type(model).__name__, "blocked": blocked}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
