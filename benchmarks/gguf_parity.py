"""Does llama.cpp say what the model says? Greedy text, logits and perplexity of a GGUF export beside the model itself.

    python benchmarks/gguf_parity.py runs/half/student --text wikitext2_test.txt --json parity.json

Twenty prompts in the model's chat template, greedy, in float32; where the texts part, the token at which they do and
how far apart the model's own two likeliest tokens are there. Then perplexity on blocks of 512 tokens of the text, for
every dtype asked for.

llama.cpp takes Δ as log(1 + exp(x)) in float32, where 1 + exp(x) keeps only the first digits of a small Δ: 6e-8 of it
is lost whatever its size. So logits are compared a second time, with Δ rounded like that in the model too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import mambify
from mambify.bench.llama_cpp import LlamaCpp
from mambify.export.gguf import export_gguf
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.io import write_json
from mambify.language_model import end_token_ids
from mambify.machine import environment

BLOCK = 512
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List three healthy breakfasts.",
    "How do I boil an egg?",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Give me a name for a cat and say why it fits.",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Summarise the story of Cinderella in one paragraph.",
    "What are the primary colours?",
    "Write an email that declines a meeting politely.",
    "Why do leaves change colour in autumn?",
    "Name five countries in Africa.",
    "What is the difference between weather and climate?",
    "Tell me a joke about computers.",
    "How many legs does a spider have?",
    "Give two reasons to learn a second language.",
    "Describe a rainy day in a big city.",
)


def main() -> None:
    """Measures, prints, and writes the file asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="for the perplexity; none without it")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtypes", default="f32,bf16,q8_0,q4_0,q4_k_m")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", type=float, help="convert MODEL to this share of attention first")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)

    loaded = mambify.load(arguments.model, dtype="float32")
    if arguments.attention is not None:
        student = mambify.convert(loaded.model, attention=arguments.attention)
        loaded = LoadedModel(student, loaded.tokenizer, loaded.source, loaded.family)
    result: dict[str, Any] = {"machine": environment("cpu"), "model": Path(arguments.model).name}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f32.gguf"
        export_gguf(loaded.model, require_tokenizer(loaded), path, dtype="f32")
        result["greedy"] = greedy(loaded, path, arguments.max_new_tokens, arguments.threads)
        path.unlink()
        if arguments.text is not None:
            blocks = read_blocks(loaded, arguments.text, arguments.tokens)
            result["perplexity"] = perplexities(loaded, blocks, arguments.dtypes.split(","), arguments.threads)
    show(result)
    if arguments.json is not None:
        write_json(arguments.json, result)


def greedy(loaded: LoadedModel, path: Path, max_new_tokens: int, threads: int) -> list[dict[str, Any]]:
    """A row a prompt: whether both say the same, where they part, and how far the logits of our text are apart."""
    tokenizer, model, rows = require_tokenizer(loaded), loaded.model, []
    stops = end_token_ids(model)
    with LlamaCpp(path, context_length=1024, threads=threads) as llama:
        for prompt in PROMPTS:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            out = mambify.generate(model, torch.tensor([tokens]), max_new_tokens=max_new_tokens)[
                0, len(tokens) :
            ].tolist()
            ours = out[: next((i for i, token in enumerate(out) if token in stops), len(out))]
            llama.reset()
            theirs = llama.greedy(tokens, max_new_tokens, stops)
            llama.reset()
            logits = llama.logits([*tokens, *ours])
            expected = model(input_ids=torch.tensor([[*tokens, *ours]])).logits[0].numpy()
            with patch.object(torch.nn.functional, "softplus", softplus_of_llama_cpp):
                alike = model(input_ids=torch.tensor([[*tokens, *ours]])).logits[0].numpy()
            row = {
                "prompt": prompt,
                "same_tokens": llama.tokenize(text) == tokens,
                "same_text": ours == theirs,
                "new_tokens": len(ours),
                "max_logit_difference": float(np.abs(logits - expected).max()),
                "max_logit_difference_with_its_softplus": float(np.abs(logits - alike).max()),
            }
            if ours != theirs:
                at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
                at = min(len(ours), len(theirs)) if at is None else at
                row |= {"parts_at": at, "gap_there": float(np.diff(np.sort(expected[len(tokens) + at - 1])[-2:])[0])}
            rows.append(row)
    return rows


def softplus_of_llama_cpp(x: torch.Tensor) -> torch.Tensor:
    """As ``ggml_compute_softplus_f32`` (ggml-impl.h) has it, without log1p."""
    return torch.where(x > 20, x, (1 + x.float().exp()).log().to(x.dtype))


def read_blocks(loaded: LoadedModel, text: Path, num_tokens: int) -> list[list[int]]:
    """The first tokens of the text, in blocks."""
    content = text.read_text(encoding="utf-8")[: num_tokens * 8]
    tokens = require_tokenizer(loaded)(content, add_special_tokens=False).input_ids[:num_tokens]
    return [tokens[first : first + BLOCK] for first in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def perplexities(
    loaded: LoadedModel, blocks: Sequence[Sequence[int]], dtypes: Sequence[str], threads: int
) -> list[dict[str, Any]]:
    """A row for the model itself, and one for every dtype in llama.cpp."""
    ours = [log_probabilities(loaded.model(input_ids=torch.tensor([block])).logits[0]) for block in blocks]
    losses = [loss(ours_TV, block) for ours_TV, block in zip(ours, blocks, strict=True)]
    rows: list[dict[str, Any]] = [
        {"engine": "mambify", "dtype": "float32", "perplexity": float(np.exp(np.mean(losses)))}
    ]
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{dtype}.gguf"
            export_gguf(loaded.model, require_tokenizer(loaded), path, dtype=dtype)
            losses, divergences = [], []
            with LlamaCpp(path, context_length=BLOCK, threads=threads) as llama:
                for ours_TV, block in zip(ours, blocks, strict=True):
                    llama.reset()
                    theirs_TV = log_probabilities(torch.from_numpy(llama.logits(block)))
                    losses.append(loss(theirs_TV, block))
                    kl = torch.nn.functional.kl_div(theirs_TV, ours_TV, reduction="sum", log_target=True)
                    divergences.append(kl.item() / len(block))
            rows.append(
                {
                    "engine": "llama.cpp",
                    "dtype": dtype,
                    "megabytes": path.stat().st_size / 1e6,
                    "perplexity": float(np.exp(np.mean(losses))),
                    "kl": float(np.mean(divergences)),
                }
            )
    return rows


def log_probabilities(logits_TV: torch.Tensor) -> torch.Tensor:
    """Of every token at every position, ``[T, V]``."""
    return logits_TV.float().log_softmax(-1)


def loss(log_probabilities_TV: torch.Tensor, block: Sequence[int]) -> float:
    """Mean negative log likelihood of a block's tokens but the first."""
    return -float(log_probabilities_TV[:-1].gather(1, torch.tensor(block[1:])[:, None]).double().mean())


def show(result: dict[str, Any]) -> None:
    """The result for people."""
    rows = result["greedy"]
    print(f"same text {sum(row['same_text'] for row in rows)} of {len(rows)}")
    print(f"largest difference of logits {max(row['max_logit_difference'] for row in rows):.1e}")
    alike = max(row["max_logit_difference_with_its_softplus"] for row in rows)
    print(f"the same with llama.cpp's softplus in the model {alike:.1e}")
    for row in rows:
        if not row["same_text"]:
            print(f"  parts at token {row['parts_at']}, gap there {row['gap_there']:.1e}: {row['prompt']}")
        if not row["same_tokens"]:
            print(f"  read as other tokens: {row['prompt']}")
    for row in result.get("perplexity", ()):
        size, divergence = row.get("megabytes"), row.get("kl")
        print(
            f"{row['engine']:10} {row['dtype']:8} perplexity {row['perplexity']:8.3f}"
            + (f"  KL {divergence:.2e}  {size:6.1f} MB" if size is not None else "")
        )


if __name__ == "__main__":
    main()
