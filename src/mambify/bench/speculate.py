"""``mambify bench speculate``: tokens a second with a draft beside our own plain decoding of the same target.

Without a target: the sizes of large models with random weights, their acceptance injected
(:mod:`mambify.bench.speculate_shapes`). With one: real text (:mod:`mambify.bench.speculate_real`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from mambify.bench import speculate_shapes
from mambify.bench.sheet import Sheet, failure
from mambify.bench.speculate_real import CONTEXT, TEMPERATURES, Case, Trials, cases_of
from mambify.errors import InvalidOptionError, did_you_mean

REAL = (*TEMPERATURES, CONTEXT)


def run(
    device: str,
    sheet: Sheet,
    only: str | None = None,
    *,
    target: str | None = None,
    draft: Sequence[str] = ("lookup",),
    prompts: Sequence[Path] = (),
) -> None:
    """Measures every part, or one.

    Args:
        only: a part of the shapes without a target; one of :data:`REAL` with one.
        target: a model to be made faster.
        draft: what drafts for it: models, ``lookup``, or ``cut:2``.
        prompts: files of questions; see :func:`mambify.bench.questions.read_questions`.

    Raises:
        InvalidOptionError: a part that wants a target and has none, or the other way round.
    """
    cases = speculate_shapes.CASES[torch.device(device).type]
    parts = list(REAL if target is not None else dict.fromkeys(case.part for case in cases))
    if only is not None and only not in parts:
        if target is None and only in REAL:
            raise InvalidOptionError(f"'{only}' is about models that are given: name one with --target")
        raise InvalidOptionError(f"no part '{only}' of speculate here: {did_you_mean(only, parts)}")
    if target is None:
        bench = speculate_shapes.Bench(device)
        sheet.facts["read_bytes_per_second"] = bench.bandwidth
        chosen = [case for case in cases if only in (None, case.part)]
        sheet.fill(chosen, bench.measure, about=speculate_shapes.about)
        return
    sheet.facts["target"] = target
    trials = Trials(device, target, draft, prompts)
    wanted = [case for case in cases_of(draft, torch.device(device).type) if only in (None, case.part)]
    sheet.fill(wanted, trials.measure, about=Case.about)


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    shown = Table(
        title=f"{result['machine']['device']}{', ' + result['target'] if 'target' in result else ''}",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("part", "draft", "of"):
        shown.add_column(heading)
    for heading in ("K", "tokens/round", "tokens/s", "plain", "ratio", "of bound"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for row in result["results"]:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: dict[str, Any]) -> Sequence[str | Text]:
    if "error" in row:
        return _failed_cells(row)
    if "peer" in row:
        return _peer_cells(row)
    if "context" in row and "model" in row:
        return _context_cells(row)
    return _real_cells(row) if "group" in row else _shape_cells(row)


def _failed_cells(row: dict[str, Any]) -> list[str | Text]:
    if "model" in row:
        of = f"after {row['context']:,} tokens"
    else:
        of = f"temperature {row['temperature']:g}" if "temperature" in row else f"{row['target']} × {row['batch']}"
    return [row["part"], row.get("draft") or row["model"], of, str(row.get("K", "")), failure(row)]


def _shape_cells(row: dict[str, Any]) -> list[str]:
    notes = f"draft {row['draft_ms']:.2f}, verify {row['verify_ms']:.2f}, rest {row['rest_ms']:.2f} ms; injected"
    notes += f"; published {row['published']:.0f}" if row["published"] else ""
    notes += f"; K {row['mean_K']:.1f} on average" if row["K"] == "auto" else ""
    return [
        row["part"], row["draft"], f"{row['target']} × {row['batch']}", str(row["K"]),
        f"{row['tokens_per_round']:.2f}", f"{row['tokens_per_second']:,.0f}",
        f"{row['plain_tokens_per_second']:,.0f}", f"{row['ratio']:.2f}×", f"{row['of_bound']:.0%}", notes,
    ]  # fmt: skip


def _real_cells(row: dict[str, Any]) -> list[str]:
    positions = " ".join("–" if share is None else f"{share:.2f}" for share in row["acceptance_by_position"])
    same = "" if row["same_answers"] is None else f"; {row['same_answers']:.0%} as plain"
    return [
        row["part"], row["draft"], f"{row['group']}, temperature {row['temperature']:g}", str(row["K"]),
        f"{row['tokens_per_round']:.2f}", f"{row['tokens_per_second']:,.0f}",
        f"{row['plain_tokens_per_second']:,.0f}", f"{row['ratio']:.2f}×", "", f"accepted {positions}{same}",
    ]  # fmt: skip


def _peer_cells(row: dict[str, Any]) -> list[str]:
    speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
    of = f"{row['group']}, temperature {row['temperature']:g}"
    return [row["peer"], row["draft"], of, "", "", speed, "", "", "", row.get("failed", "")[:60]]


def _context_cells(row: dict[str, Any]) -> list[str]:
    speed, held = f"{row['tokens_per_second']:,.1f}", f"{row['state_bytes'] / 1e6:.1f} MB of keys, values and states"
    return [row["part"], row["model"], f"after {row['context']:,} tokens", "", "", "", speed, "", "", held]
