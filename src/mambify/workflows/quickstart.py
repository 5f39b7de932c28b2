"""``mambify quickstart``: synthesize → convert → distil → evaluate → speak → report, on the embedded teacher.

OUT/settings.json   what this quickstart does, so that the same command continues an interrupted one
OUT/data/           text sampled from the teacher
OUT/run/            the distillation run
OUT/student/        the model
OUT/report.json     every figure       OUT/report.html   the same to look at
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mambify.conversion.plan import CONTEXTS, state_bytes
from mambify.data.synthesize import synthesize
from mambify.decode.stream import stream
from mambify.distill.arguments import use_bfloat16
from mambify.distill.logs import Listener, read_metrics
from mambify.distill.recipe import Recipe, parse_recipe
from mambify.distill.run import in_dtype, summaries
from mambify.errors import OutputExistsError
from mambify.evaluate.compare import compare
from mambify.evaluate.report import render_report
from mambify.families.load import LoadedModel, load, require_tokenizer
from mambify.hub import update_card
from mambify.io import atomic_write_text, read_json, remove, require_new, write_json
from mambify.machine import default_device, environment
from mambify.model import HybridForCausalLM
from mambify.workflows.distill import distill

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about the sea.",
)


@dataclass(frozen=True)
class Settings:
    """How much a quickstart does; :func:`settings_for` fits it to the machine.

    Attributes:
        attention: share of layers that keep attention.
        tokens: to sample from the teacher, ``sampling_batch`` conversations at a time.
        heldout: share of the conversations that is kept for evaluation.
        align_tokens, kd_tokens: to train on in each stage, in steps of ``batch_tokens``.
        context_length: of training and evaluation.
        evaluation_tokens: held-out tokens that are scored.
        init: how new mixers start.
    """

    teacher: str
    attention: float
    tokens: int
    sampling_batch: int
    documents_per_shard: int
    max_user_tokens: int
    max_new_tokens: int
    heldout: float
    align_tokens: int
    kd_tokens: int
    batch_tokens: int
    align_learning_rate: float
    kd_learning_rate: float
    context_length: int
    evaluation_tokens: int
    init: str = "identity"
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def settings_for(device: str, teacher: str = "smollm2") -> Settings:
    """A quarter of the layers in minutes on two CPU cores; half of them, and much more text, on a GPU."""
    if device == "cpu":
        return Settings(
            teacher=teacher,
            attention=0.75,
            tokens=32_000,
            sampling_batch=128,
            documents_per_shard=128,
            max_user_tokens=48,
            max_new_tokens=128,
            heldout=0.15,
            align_tokens=20_480,
            kd_tokens=24_576,
            batch_tokens=2048,
            align_learning_rate=1.5e-3,
            kd_learning_rate=4e-4,
            context_length=256,
            evaluation_tokens=8192,
            init="measured",
        )
    return Settings(
        teacher=teacher,
        attention=0.5,
        tokens=4_000_000,
        sampling_batch=1024,
        documents_per_shard=16_384,
        max_user_tokens=64,
        max_new_tokens=256,
        heldout=0.02,
        align_tokens=2_000_000,
        kd_tokens=8_000_000,
        batch_tokens=4096,
        align_learning_rate=1.5e-3,
        kd_learning_rate=4e-4,
        context_length=512,
        evaluation_tokens=32_768,
    )


def quickstart(
    out: str | Path,
    *,
    device: str | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    announce: Callable[[str], None] | None = None,
    listener: Listener | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Does the whole job once, or what an interrupted one left; returns what ``report.json`` holds.

    Args:
        announce: told in words what begins.
        listener: told of every training step.
        progress: told (what, done, total) of sampling and scoring.

    Raises:
        OutputExistsError: ``out`` holds something else and ``overwrite`` is false.
    """
    device = device or default_device()
    settings = settings or settings_for(device)
    say = announce or (lambda _: None)
    tell = progress or (lambda *_: None)
    out = _open(Path(out), settings, overwrite=overwrite)
    seconds: dict[str, float] = {}

    with _timed(seconds, "load"):
        say(f"loading the teacher {settings.teacher}")
        teacher = load(settings.teacher)
    tokenizer = require_tokenizer(teacher)
    with _timed(seconds, "synthesize"):
        say(f"sampling {settings.tokens:,} tokens from it")
        _synthesize(teacher, out / "data", settings, device, tell)
    with _timed(seconds, "distill"):
        say(f"converting {1 - settings.attention:.0%} of its layers to Mamba2 and distilling")
        recipe = _recipe(settings, out)
        student, run = distill(recipe, device=device, teacher=teacher, save_to=out / "student", listener=listener)
        teacher.model.to(device)
        student.to(device)
    with _timed(seconds, "evaluate"):
        say("scoring teacher and student on held-out text")
        scores = compare(
            student,
            teacher.model,
            {"held-out": out / "data"},
            tokenizer=tokenizer,
            context_length=settings.context_length,
            max_tokens=settings.evaluation_tokens,
            progress=lambda name, done, total: tell(f"score {name}", done, total),
        )
    update_card(out / "student", [scores])
    with _timed(seconds, "generate"):
        say("asking both three questions")
        samples = [_ask(prompt, teacher.model, student, tokenizer, tell, i) for i, prompt in enumerate(PROMPTS)]
    report = _report(settings, recipe, run, teacher.model, student, scores, samples, seconds, device)
    write_json(out / "report.json", report)
    atomic_write_text(out / "report.html", render_report(report))
    return report


def _open(out: Path, settings: Settings, *, overwrite: bool) -> Path:
    marker = out / "settings.json"
    if overwrite:
        remove(require_new(out, overwrite=True))
    if marker.is_file():
        if read_json(marker) != asdict(settings):
            raise OutputExistsError(f"{out} holds another quickstart: choose another --out or pass --overwrite")
        return out
    require_new(out)
    write_json(marker, asdict(settings))
    return out


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _synthesize(
    teacher: LoadedModel, out: Path, settings: Settings, device: str, tell: Callable[[str, int, int], None]
) -> None:
    dtype = torch.bfloat16 if use_bfloat16("auto", device) else torch.float32
    synthesize(
        in_dtype(teacher.model, dtype, device),
        require_tokenizer(teacher),
        out,
        num_tokens=settings.tokens,
        seed=settings.seed,
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        max_user_tokens=settings.max_user_tokens,
        batch_size=settings.sampling_batch,
        documents_per_shard=settings.documents_per_shard,
        heldout=settings.heldout,
        teacher=settings.teacher,
        progress=lambda done, total: tell("sample", min(done, total), total),
    )


def _recipe(settings: Settings, out: Path) -> Recipe:
    common = {"batch_tokens": settings.batch_tokens}
    return parse_recipe(
        {
            "teacher": settings.teacher,
            "student": {"mixer": "mamba2", "attention": settings.attention, "init": settings.init},
            "data": {
                "train": str(out / "data"),
                "heldout": str(out / "data"),
                "context_length": settings.context_length,
            },
            "stages": [
                {
                    "kind": "align",
                    "tokens": settings.align_tokens,
                    "learning_rate": settings.align_learning_rate,
                    **common,
                },
                {"kind": "kd", "tokens": settings.kd_tokens, "learning_rate": settings.kd_learning_rate, **common},
            ],
            "output": str(out / "run"),
            "seed": settings.seed,
            "log_every": 1,
            # On a CPU, where a step takes seconds, an interrupted stage is not begun anew.
            "checkpoint_every": min(100, max(1, settings.kd_tokens // settings.batch_tokens // 3)),
        }
    )


def _ask(
    prompt: str,
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    tokenizer: Any,
    tell: Callable[[str, int, int], None],
    index: int,
) -> dict[str, str]:
    answers = {}
    for offset, (name, model) in enumerate((("teacher", teacher), ("student", student))):
        messages = [{"role": "user", "content": prompt}]
        answers[name] = "".join(stream(model, tokenizer, messages, max_new_tokens=64, temperature=0.0)).strip()
        tell("answer", 2 * index + offset + 1, 2 * len(PROMPTS))
    return {"prompt": prompt} | answers


def _report(
    settings: Settings,
    recipe: Recipe,
    run: Path,
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    scores: dict[str, Any],
    samples: list[dict[str, str]],
    seconds: dict[str, float],
    device: str,
) -> dict[str, Any]:
    """Everything as plain JSON, under the names that :func:`mambify.evaluate.report.render_report` reads."""
    score = scores["sources"]["held-out"]
    ours, theirs = score["student"], score["teacher"]
    metrics = read_metrics(run / "metrics.jsonl")
    stages = [
        stage | {"name": name, "history": [row for row in metrics if row["stage"] == name and row["step"] >= 0]}
        for stage in summaries(run)
        for name in (stage["stage"],)
    ]
    mixers = [student.get_submodule(f"model.layers.{i}.mixer") for i in student.config.converted_layers]
    new = sum(p.numel() for mixer in mixers for p in mixer.parameters())
    total = sum(p.numel() for p in student.parameters())
    here = environment(device)
    return {
        "title": f"{settings.teacher}: {student.num_converted} of {len(student.model.layers)} layers as Mamba2",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": here["device"] if device != "cpu" else f"{here['device']}, {here['num_threads']} threads",
        "versions": {name: here[name] for name in ("mambify", "torch", "transformers", "python")},
        "teacher": {
            "name": settings.teacher,
            "parameters": sum(p.numel() for p in teacher.parameters()),
            "perplexity": theirs["perplexity"],
            "kv_bytes": {tokens: state_bytes(teacher.config, tokens) for tokens in CONTEXTS},
        },
        "student": {
            "perplexity": ours["perplexity"],
            "perplexity_ratio": ours["perplexity_ratio"],
            "kl": ours["kl"],
            "top1_agreement": ours["top1_agreement"],
            "parameters_new": new,
            "parameters_kept": total - new,
            "state_bytes": {tokens: state_bytes(student.config, tokens) for tokens in CONTEXTS},
            "layer_types": student.config.layer_mixers,
            "intervals": {"level": 0.95}
            | {name: ours.get(f"{name}_interval") for name in ("perplexity", "kl", "top1_agreement")},
        },
        "stages": stages,
        "alignment": _alignment(metrics),
        "text_scores": {
            "held-out text sampled from the teacher": {
                "teacher_perplexity": theirs["perplexity"],
                "student_perplexity": ours["perplexity"],
                "kl": ours["kl"],
                "top1_agreement": ours["top1_agreement"],
            }
        },
        "samples": samples,
        "seconds": seconds,
        "settings": asdict(settings) | {"recipe": recipe.model_dump(mode="json")},
    }


def _alignment(metrics: list[dict[str, Any]]) -> dict[int, list[list[float]]]:
    """Layer → [[step, error], …] of the align stage; step −1 is the freshly converted mixer."""
    curves: dict[int, list[list[float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("layer_"):
                curves.setdefault(int(name.removeprefix("layer_")), []).append([row["step"], value])
    return curves
