"""``mambify bench inits``: what each initialisation is worth before training, after calibration, after a little of it.

The embedded teacher, half of its layers to Mamba2. All initialisations see the same text, the same calibration blocks
and the same batches; they are scored on the held-out side, which is checked to share nothing with the rest. Without
``--text`` the text is sampled from the teacher itself. With ``--out`` each row is kept there as soon as it is measured,
and not measured again: so a run that was killed goes on, and several share the work by ``--only``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from mambify.bench.sheet import Row, Sheet, failure
from mambify.conversion import CALIBRATION_TOKENS, INITIALISATIONS, calibrate, convert
from mambify.data.calibration import calibration_blocks, calibration_documents
from mambify.data.documents import read_documents
from mambify.data.overlap import check_disjoint
from mambify.data.packing import pack
from mambify.data.synthesize import synthesize
from mambify.distill.arguments import use_bfloat16
from mambify.distill.parallel import joined
from mambify.distill.recipe import parse_recipe
from mambify.distill.run import inputs_of, open_run, run_stages
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.evaluate.perplexity import evaluate_language_model
from mambify.families.load import LoadedModel, load, require_tokenizer
from mambify.io import read_json, write_json
from mambify.model import HybridForCausalLM

_TEACHER, _CONTEXT, _SEED = "smollm2", 512, 0


@dataclass(frozen=True)
class Budget:
    """Tokens of each part; of training, 40% are the align stage's and the rest kd's."""

    train: int
    score: int
    batch: int = 4096
    calibration: int = CALIBRATION_TOKENS


BUDGETS = {"cpu": Budget(train=0, score=4096), "cuda": Budget(train=1_000_000, score=32_768)}


def run(
    device: str,
    sheet: Sheet,
    only: str | None = None,
    *,
    text: str | None = None,
    tokens: int | None = None,
    out: Path | None = None,
) -> None:
    """Scores every initialisation, or some.

    Args:
        only: names, with commas between them.
        text: to learn and be scored on, its two sides apart; sampled from the teacher where not given.
        tokens: to train each on; 0 for none. By default as :data:`BUDGETS` says for the device.
        out: where each row is kept, and looked for.

    Raises:
        InvalidOptionError: ``only`` names what is none; ``out`` without ``text``, that is with another text each time.
    """
    budget = BUDGETS[torch.device(device).type]
    if tokens is not None:
        budget = Budget(tokens, budget.score)
    if out is not None and text is None:
        raise InvalidOptionError("--out keeps what was measured on one text: give --text too")
    names = _names(only)
    files = {} if out is None else {name: out / f"{name}-{_key(text, budget)}.json" for name in names}
    kept: dict[str, Row] = {name: read_json(file) for name, file in files.items() if file.is_file()}
    sheet.facts |= {"teacher": _TEACHER, "text": text or "sampled from the teacher", "budget": asdict(budget)}
    with tempfile.TemporaryDirectory() as folder:
        trial = _trial(device, text, budget, Path(folder)) if len(kept) < len(names) else kept.__getitem__

        def measure(name: str) -> Row:
            if name in kept:
                return kept[name]
            row = trial(name)
            if name in files:
                write_json(files[name], row)
            return row

        sheet.fill(names, measure, about=lambda name: {"init": name})


def _names(only: str | None) -> list[str]:
    if only is None:
        return list(INITIALISATIONS)
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in INITIALISATIONS:
            raise InvalidOptionError(f"nothing in 'inits' is called '{name}': {did_you_mean(name, INITIALISATIONS)}")
    return [name for name in INITIALISATIONS if name in wanted]


def _key(text: str | None, budget: Budget) -> str:
    """What decides a row, beside its name."""
    return hashlib.sha256(json.dumps([_TEACHER, text, asdict(budget)]).encode()).hexdigest()[:10]


def _trial(device: str, text: str | None, budget: Budget, folder: Path) -> Callable[[str], Row]:
    """How the row of an initialisation is measured; loads the teacher and the text that they all share."""
    dtype = torch.bfloat16 if use_bfloat16("auto", device) else torch.float32
    loaded = load(_TEACHER, dtype=dtype, device=device)
    source = text or _sampled(loaded, folder / "data", budget)
    calibration_NT, heldout_NT = _blocks(loaded, source, budget)
    return lambda name: _row(name, loaded, source, calibration_NT, heldout_NT, budget, folder / name)


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    shown = Table(title=result["machine"]["device"], title_justify="left", box=SIMPLE, pad_edge=False)
    stages = next((list(row["scores"]) for row in result["results"] if "scores" in row), ["untrained"])
    shown.add_column("init")
    for stage in stages:
        for heading in ("KL", "ratio", "agreement"):
            shown.add_column(f"{stage}\n{heading}", justify="right")
    for row in result["results"]:
        if "error" in row:
            shown.add_row(row["init"], failure(row))
            continue
        cells = [row["init"]]
        for stage in stages:
            score = row["scores"][stage]
            cells += [f"{score['kl']:.3f}", f"{score['perplexity_ratio']:.4g}", f"{score['top1_agreement']:.1%}"]
        shown.add_row(*cells)
    return shown


def _row(
    name: str,
    teacher: LoadedModel,
    source: str,
    calibration_NT: Tensor,
    heldout_NT: Tensor,
    budget: Budget,
    folder: Path,
) -> Row:
    start = time.perf_counter()
    student = convert(teacher, init=name, calibration=calibration_NT, seed=_SEED)
    seconds = time.perf_counter() - start
    scores = {"untrained": _score(student, teacher.model, heldout_NT)}
    calibrate(student, teacher.model, calibration_NT.to(student.device).split(8))
    scores["calibrated"] = _score(student, teacher.model, heldout_NT)
    if budget.train:
        scores["trained"] = _score(_trained(name, teacher, source, budget, folder), teacher.model, heldout_NT)
    return {"init": name, "seconds": round(seconds, 2), "scores": scores}


def _score(student: HybridForCausalLM, teacher: HybridForCausalLM, heldout_NT: Tensor) -> dict[str, float]:
    found = evaluate_language_model(student, heldout_NT, teacher=teacher, resamples=1)
    assert found.kl and found.perplexity_ratio and found.top1_agreement
    return {
        "kl": found.kl.value,
        "perplexity_ratio": found.perplexity_ratio.value,
        "top1_agreement": found.top1_agreement.value,
    }


def _trained(name: str, teacher: LoadedModel, source: str, budget: Budget, folder: Path) -> HybridForCausalLM:
    """The student after align and kd, on the training side of the text."""
    stage = {"batch_tokens": min(budget.batch, max(budget.train // 4, _CONTEXT))}
    align = max(int(0.4 * budget.train), _CONTEXT)
    recipe = parse_recipe(
        {
            "teacher": _TEACHER,
            "student": {"init": name},
            "data": {"train": source, "context_length": _CONTEXT},
            "stages": [
                {"kind": "align", "tokens": align, "learning_rate": 1e-2, **stage},
                {"kind": "kd", "tokens": max(budget.train - align, _CONTEXT), "learning_rate": 2e-3, **stage},
            ],
            "output": str(folder),
            "seed": _SEED,
            "report_to": [],
        }
    )
    documents = calibration_documents(source, require_tokenizer(teacher), num_tokens=budget.train)
    with joined(str(teacher.model.device)) as processes:
        dataset = pack(documents, _CONTEXT, seed=_SEED)
        inputs = inputs_of(teacher, teacher, [dataset.fingerprint])
        run_folder = open_run(recipe, processes, inputs=inputs)
        student = run_stages(recipe, run_folder, teacher=teacher, dataset=lambda _: dataset, processes=processes)
    student.to(teacher.model.dtype)  # the new mixers leave training in float32
    return student


def _blocks(teacher: LoadedModel, source: str, budget: Budget) -> tuple[Tensor, Tensor]:
    """Calibration and held-out blocks ``[N, T]``; no document of the latter is among what is learned on."""
    tokenizer = require_tokenizer(teacher)
    learned = calibration_documents(source, tokenizer, num_tokens=max(budget.calibration, budget.train))
    heldout = read_documents(source, tokenizer, split="heldout", max_tokens=budget.score)
    check_disjoint(learned, heldout)
    sides = (learned, budget.calibration), (heldout, budget.score)
    calibration_NT, heldout_NT = (
        calibration_blocks(side, num_tokens=count, context_length=_CONTEXT) for side, count in sides
    )
    return calibration_NT, heldout_NT


def _sampled(teacher: LoadedModel, out: Path, budget: Budget) -> str:
    """Text from the teacher itself, a tenth of it held out."""
    wanted = int(1.2 * max(budget.train, budget.calibration, 8 * budget.score))
    synthesize(
        teacher.model,
        require_tokenizer(teacher),
        out,
        num_tokens=wanted,
        heldout=0.1,
        seed=_SEED,
        teacher=_TEACHER,
        kind="mixed",
    )
    return str(out)
