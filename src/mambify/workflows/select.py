"""``mambify select``: which layers should keep attention, by one measure or all of them, with the control beside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambify.conversion import CALIBRATION_TOKENS, apply_plan, calibrate, needs_text, plan
from mambify.conversion.plan import uniform_attention_layers
from mambify.data.calibration import calibration_blocks, calibration_documents
from mambify.data.documents import read_documents
from mambify.data.overlap import check_disjoint
from mambify.distill.arguments import use_bfloat16
from mambify.distill.logs import Listener, read_metrics
from mambify.distill.recipe import parse_recipe
from mambify.distill.run import in_dtype
from mambify.errors import InvalidOptionError, UsageError, did_you_mean
from mambify.families.load import LoadedModel, load, load_config, require_tokenizer
from mambify.machine import default_device, environment
from mambify.mixers import Mixer
from mambify.model import HybridForCausalLM
from mambify.selection import (
    METHODS,
    Candidates,
    budgeted_layers,
    count_for_share,
    swapped_divergences,
    top_layers,
)
from mambify.workflows.distill import distill

ALL = "all"
CONTROL = "uniform"
#: what ``all`` stands for; ``greedy`` costs as many times as layers are kept and is asked for by name
USUAL = (CONTROL, "leave-one-out", "restore-one", "trial")


@dataclass(frozen=True)
class Budget:
    """How much attention there may be: a share of the layers, or bytes of one sequence at a context length."""

    share: float | None = None
    max_bytes: int | None = None
    context: int = 32_768

    def layers(self, config: Any, worth: Mapping[int, float], mixer: str) -> list[int]:
        """The most worthwhile layers that fit."""
        if self.max_bytes is not None:
            return budgeted_layers(config, worth, mixer=mixer, context=self.context, max_bytes=self.max_bytes)
        assert self.share is not None
        return top_layers(worth, count_for_share(config.num_hidden_layers, self.share))

    def spread(self, config: Any, mixer: str) -> tuple[int, ...]:
        """The even spread within the budget: that of the share, or of as many layers as fit."""
        num_layers = config.num_hidden_layers
        if self.share is not None:
            return tuple(uniform_attention_layers(num_layers, self.share))
        count = len(self.layers(config, dict.fromkeys(range(num_layers), 1.0), mixer))
        return tuple(uniform_attention_layers(num_layers, count / num_layers))


def methods_of(name: str) -> list[str]:
    """The methods that ``name`` stands for, the control always among them.

    Raises:
        InvalidOptionError: none.
    """
    if name != ALL and name not in METHODS:
        raise InvalidOptionError(f"no selection method '{name}': {did_you_mean(name, [*METHODS, ALL])}")
    return list(USUAL) if name == ALL else list(dict.fromkeys([CONTROL, name]))


def select(
    teacher: str,
    text: str,
    budget: Budget,
    *,
    method: str = ALL,
    mixer: str = "mamba2",
    init: str = "identity",
    align_tokens: int = 2_000_000,
    score_tokens: int = 32_768,
    context_length: int = 512,
    device: str | None = None,
    run: Path | None = None,
    announce: Callable[[str], None] | None = None,
    listener: Listener | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores every layer and chooses those that keep attention; returns the report as plain JSON values.

    Every layer gets a mixer, calibrated and aligned side by side on the training side of the text; scores are taken on
    one half of its held-out side, and the choices are compared, as they stand and untrained, on the other.

    Args:
        text: whatever :func:`mambify.data.documents.read_documents` reads.
        align_tokens: to align the mixers on before anything is scored; 0: only calibrate them.
        score_tokens: of held-out text, both halves together.
        run: directory of the alignment, which the same call continues or reuses; a temporary one by default.
        progress: told (what, done, total).

    Raises:
        UsageError: an unknown teacher, method, mixer, text, or a budget that cannot be met.
        DataOverlapError: training and held-out side share documents.
    """
    names = methods_of(method)
    say, tell = announce or (lambda _: None), progress or (lambda *_: None)
    config = load_config(teacher)
    planned = plan(config, mixer=mixer, attention_layers=[], init=init)  # what cannot be is known at once
    if len(planned.converted) != config.num_hidden_layers:
        raise UsageError(f"{teacher} is converted already: choose layers of a model that has attention in all of them")
    spread = budget.spread(config, mixer)
    place = device or default_device()
    say(f"loading {teacher}")
    loaded = load(teacher)
    say("reading the text")
    blocks_NT = _heldout_blocks(loaded, text, max(align_tokens, CALIBRATION_TOKENS), score_tokens, context_length)
    with tempfile.TemporaryDirectory() as folder:
        if align_tokens:
            say("aligning a mixer in every layer")
            student, errors = _aligned(
                loaded, text, mixer, init, align_tokens, context_length, place, run or Path(folder) / "run", listener
            )
        else:
            say("calibrating a mixer in every layer")
            student, errors = _calibrated(loaded, text, mixer, init, context_length, place)
    working = in_dtype(loaded.model, torch.bfloat16 if use_bfloat16("auto", place) else torch.float32, place).eval()
    mixers = {index: _mixer(student, index).to(device=place, dtype=working.dtype) for index in planned.converted}
    half = max(len(blocks_NT) // 2, 1)
    candidates = Candidates(working, mixers, errors, blocks_NT[:half], spread)
    found = {}
    for name in names:
        say(f"scoring layers: {name}")
        found[name] = METHODS[name](candidates, lambda done, total, name=name: tell(name, done, total))  # type: ignore[misc]
    chosen = {name: budget.layers(config, scores.worth, mixer) for name, scores in found.items()}
    say("comparing the choices")
    measured = _divergences(working, mixers, chosen, blocks_NT[half:] if len(blocks_NT) > 1 else blocks_NT)
    results = {
        name: {
            "worth": {str(index): value for index, value in sorted(scores.worth.items())},
            **scores.measured,
            "attention_layers": chosen[name],
            "not_in_uniform": sorted(set(chosen[name]) - set(chosen[CONTROL])),
            "only_in_uniform": sorted(set(chosen[CONTROL]) - set(chosen[name])),
            "kl": measured[name],
        }
        for name, scores in found.items()
    }
    best = min(names, key=lambda name: measured[name]) if method == ALL else method
    return {
        "teacher": teacher,
        "mixer": mixer,
        "init": init,
        "text": text,
        "budget": asdict(budget),
        "align_tokens": align_tokens,
        "context_length": context_length,
        "score_tokens": int(blocks_NT.numel()),
        "num_layers": config.num_hidden_layers,
        "methods": results,
        "best": best,
        "attention_layers": chosen[best],
        "machine": environment(place),
    }


def _heldout_blocks(
    teacher: LoadedModel, text: str, train_tokens: int, score_tokens: int, context_length: int
) -> Tensor:
    """The held-out side as blocks, checked to share nothing with what the mixers are made on."""
    tokenizer = require_tokenizer(teacher)
    heldout = read_documents(text, tokenizer, split="heldout", max_tokens=score_tokens)
    check_disjoint(calibration_documents(text, tokenizer, num_tokens=train_tokens), heldout)
    return calibration_blocks(heldout, num_tokens=score_tokens, context_length=context_length)


def _aligned(
    teacher: LoadedModel,
    text: str,
    mixer: str,
    init: str,
    num_tokens: int,
    context_length: int,
    device: str,
    run: Path,
    listener: Listener | None,
) -> tuple[HybridForCausalLM, dict[int, float]]:
    """A student without attention, each mixer aligned with the attention at its place; and the errors left."""
    batch_tokens = max(min(16_384, num_tokens), context_length) // context_length * context_length
    recipe = parse_recipe(
        {
            "teacher": teacher.source,
            "student": {"mixer": mixer, "attention": 0.0, "init": init},
            "data": {"train": text, "context_length": context_length},
            "stages": [{"kind": "align", "tokens": num_tokens, "batch_tokens": batch_tokens}],
            "output": str(run),
            "log_every": 1,
            "report_to": [],
        }
    )
    student, _ = distill(recipe, device=device, teacher=teacher, listener=listener)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] >= 0][-10:]
    layers = student.config.converted_layers
    return student, {index: sum(row[f"layer_{index:02d}"] for row in rows) / len(rows) for index in layers}


def _calibrated(
    teacher: LoadedModel, text: str, mixer: str, init: str, context_length: int, device: str
) -> tuple[HybridForCausalLM, dict[int, float]]:
    """The same without training: output projections by least squares alone."""
    documents = calibration_documents(text, require_tokenizer(teacher), num_tokens=CALIBRATION_TOKENS)
    ids_NT = calibration_blocks(documents, num_tokens=CALIBRATION_TOKENS, context_length=context_length).to(device)
    working = in_dtype(teacher.model, torch.float32, device)
    planned = plan(working.config, mixer=mixer, attention_layers=[], init=init)
    student = apply_plan(working, planned, calibration=ids_NT if needs_text(init) else None)
    errors = calibrate(student, working, ids_NT.split(8))
    return student, {index: after for index, (_, after) in errors.items()}


def _mixer(student: HybridForCausalLM, index: int) -> Mixer:
    mixer = student.model.layers[index].mixer
    assert isinstance(mixer, Mixer)
    return mixer


def _divergences(
    teacher: HybridForCausalLM, mixers: Mapping[int, Mixer], chosen: Mapping[str, Sequence[int]], blocks_NT: Tensor
) -> dict[str, float]:
    """KL of every choice as it stands: its layers' attention, the candidates' mixers elsewhere."""
    return {
        name: swapped_divergences(
            teacher, {index: mixer for index, mixer in mixers.items() if index not in layers}, {}, blocks_NT
        ).base
        for name, layers in chosen.items()
    }
