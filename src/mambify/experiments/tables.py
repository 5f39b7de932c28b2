"""The tables of arXiv 2408.15237 that ``mambify bench paper-table-6`` … ``-9`` make again; its figures are quoted."""

from __future__ import annotations

from collections.abc import Mapping

from mambify.experiments.paper import Conclusion, PaperTable, Row
from mambify.experiments.request import Request
from mambify.experiments.students import attention_of, last_layers, made, student, tuned

_SIZE = "the teacher and the tokens are a small fraction of 8 billion parameters and 20 billion tokens"
_TEXT = "perplexity is that of held-out text which the teacher wrote; the ratio to the teacher's is what compares"
_LIKELIHOOD = ("perplexity", "KL")

# ---- table 6: the share of attention; supervised tuning and preferences --------------------------------------------

_SHARES = {"50%": 0.5, "25%": 0.25, "12.5%": 0.125, "6.25%": 0.0625, "0%": 0.0}


def _table6(request: Request) -> Mapping[str, Row]:
    preset, (tokens,) = request.recipes[0], request.tokens
    if request.student is not None:
        given = made(request.student, request.student)
        share = attention_of(request.student)
        name = min(_SHARES, key=lambda name: abs(_SHARES[name] - share))
        distilled = {name: given}
    else:
        distilled = {
            name: student(f"{preset} {name}", request, preset, tokens, attention=share)
            for name, share in _SHARES.items()
        }
    rows = {"100%": Row(None)} | {name: Row(job) for name, job in distilled.items()}
    for name in distilled if request.student is not None else ("50%", "25%"):
        label = distilled[name].label
        if request.instruct is not None:
            sft = tuned(f"{label} SFT", request, distilled[name], "sft", tokens)
            rows[f"{name} +SFT"] = Row(sft)
        if request.preferences is not None:
            rows[f"{name} +DPO"] = Row(tuned(f"{label} DPO", request, distilled[name], "dpo", tokens))
        if request.instruct is not None and request.preferences is not None:
            rows[f"{name} +SFT+DPO"] = Row(tuned(f"{label} SFT DPO", request, sft, "dpo", tokens))
    return rows


_TUNED = ("preferred", "rewarded")
_TABLE6 = PaperTable(
    title="Table 6: share of attention, and tuning after distillation",
    paper={
        "100%": {"perplexity": 2.02},
        "50%": {"perplexity": 2.09, "MT-Bench": 5.55},
        "25%": {"perplexity": 2.20, "MT-Bench": 5.01},
        "6.25%": {"perplexity": 2.46},
        "0%": {"perplexity": 3.36},
        "50% +SFT": {"MT-Bench": 5.61},
        "50% +DPO": {"MT-Bench": 5.42},
        "50% +SFT+DPO": {"MT-Bench": 6.69},
        "25% +SFT": {"MT-Bench": 4.97},
        "25% +DPO": {"MT-Bench": 4.84},
        "25% +SFT+DPO": {"MT-Bench": 6.10},
    },
    rows=_table6,
    conclusions=(
        Conclusion("Less attention, higher perplexity", ("100%", "50%", "25%", "6.25%", "0%"), "perplexity"),
        Conclusion("SFT and DPO together are better than neither, at 50%", ("50% +SFT+DPO", "50%"), "MT-Bench", _TUNED),
        Conclusion("SFT and DPO together are better than neither, at 25%", ("25% +SFT+DPO", "25%"), "MT-Bench", _TUNED),
        Conclusion("DPO without SFT is worse than neither, at 50%", ("50%", "50% +DPO"), "MT-Bench", _TUNED),
        Conclusion("DPO without SFT is worse than neither, at 25%", ("25%", "25% +DPO"), "MT-Bench", _TUNED),
        Conclusion("With SFT before it DPO gains more, at 50%", ("50% +SFT+DPO", "50% +DPO"), "MT-Bench", _TUNED),
        Conclusion("With SFT before it DPO gains more, at 25%", ("25% +SFT+DPO", "25% +DPO"), "MT-Bench", _TUNED),
    ),
    differs=(
        _SIZE,
        _TEXT,
        "MT-Bench has a judge that is not at hand: ours is the share of held-out pairs in which the preferred answer "
        "is the likelier one (preferred), or has gained more on the teacher (rewarded)",
    ),
    recipe="best",
)

# ---- table 7: frozen MLPs, attention init, interleaving, one step after another ------------------------------------


def _table7(request: Request) -> Mapping[str, Row]:
    preset, (tokens,) = request.recipes[0], request.tokens
    rows = {}
    for name, share in (("0%", 0.0), ("50%", 0.5)):
        for start, changes in (("attention init", []), ("no attention init", ["student.init=random"])):
            for mlps, train_mlps in (("frozen MLPs", False), ("trained MLPs", True)):
                label = f"{name}, {start}, {mlps}"
                job = student(
                    f"{preset} {label}", request, preset, tokens, *changes, attention=share, train_mlps=train_mlps
                )
                rows[label] = Row(job)
    stepwise = student(f"{preset} stepwise", request, preset, tokens, "progressive=[0.5]", attention=0.25)
    at_once = student(f"{preset} at once", request, preset, tokens, "progressive=[]", attention=0.25)
    rows |= {"25%, interleaved, stepwise": Row(stepwise), "25%, interleaved, at once": Row(at_once)}
    for name, share in (("25%", 0.25), ("50%", 0.5)):
        layers = f"student.attention_layers={last_layers(request, share)}"
        job = student(
            f"{preset} {name} in one piece", request, preset, tokens, "progressive=[]", layers, attention=share
        )
        rows[f"{name}, in one piece"] = Row(job)
    return rows


def _conclusion7(better: str, worse: str, text: str) -> Conclusion:
    return Conclusion(text, (better, worse), "perplexity", _LIKELIHOOD)


_TABLE7 = PaperTable(
    title="Table 7: initialisation, frozen MLPs, and how layers are converted",
    paper={
        f"{name}, {start}, {mlps}": {"perplexity": value}
        for name, start, mlps, value in (
            ("0%", "attention init", "frozen MLPs", 3.36),
            ("0%", "attention init", "trained MLPs", 66.7),
            ("0%", "no attention init", "frozen MLPs", 18.2),
            ("0%", "no attention init", "trained MLPs", 20.3),
            ("50%", "attention init", "frozen MLPs", 2.09),
            ("50%", "attention init", "trained MLPs", 9.1),
            ("50%", "no attention init", "frozen MLPs", 7.4),
            ("50%", "no attention init", "trained MLPs", 11.2),
        )
    }
    | {
        "25%, interleaved, stepwise": {"perplexity": 2.20},
        "25%, interleaved, at once": {"perplexity": 2.29},
        "25%, in one piece": {"perplexity": 2.89},
        "50%, in one piece": {"perplexity": 2.41},
    },
    rows=_table7,
    conclusions=(
        *(
            _conclusion7(f"{name}, attention init, frozen MLPs", f"{name}, no attention init, frozen MLPs", text)
            for name, text in (
                ("0%", "Attention init is better than none, at 0%"),
                ("50%", "Attention init is better than none, at 50%"),
            )
        ),
        *(
            _conclusion7(f"{name}, {start}, frozen MLPs", f"{name}, {start}, trained MLPs", f"{text}, at {name}")
            for start, text in (
                ("attention init", "Frozen MLPs are better than trained ones"),
                ("no attention init", "Frozen MLPs are better than trained ones, without attention init"),
            )
            for name in ("0%", "50%")
        ),
        _conclusion7(
            "25%, interleaved, stepwise", "25%, interleaved, at once", "Converting step by step is better than at once"
        ),
        _conclusion7("25%, interleaved, at once", "25%, in one piece", "Interleaved layers are better, at 25%"),
        _conclusion7("50%, attention init, frozen MLPs", "50%, in one piece", "Interleaved layers are better, at 50%"),
    ),
    differs=(
        _SIZE,
        _TEXT,
        "MLPs that train do so at the mixers' learning rate",
        "attention in one piece is kept in the topmost layers",
    ),
)

# ---- tables 8 and 9: without attention init; without the Mamba layers ----------------------------------------------

_FULL, _RANDOM, _REMOVED = "full", "no attention init", "Mamba layers removed"
_TASKS = ("arc_easy", "piqa", "openbookqa", "commonsense_qa", "mean of tasks")


def _full(request: Request) -> Row:
    preset, (tokens,) = request.recipes[0], request.tokens
    return Row(student(f"{preset} full", request, preset, tokens))


def _table8(request: Request) -> Mapping[str, Row]:
    preset, (tokens,) = request.recipes[0], request.tokens
    without = student(f"{preset} without attention init", request, preset, tokens, "student.init=random")
    return {"teacher": Row(None), _FULL: _full(request), _RANDOM: Row(without)}


def _table9(request: Request) -> Mapping[str, Row]:
    full = _full(request)
    return {"teacher": Row(None), _FULL: full, _REMOVED: Row(full.job, silenced=True)}


_PAPER_FULL = {
    "LAMBADA perplexity": 6.20,
    "MMLU": 47.98,
    "ARC-C": 49.15,
    "TruthfulQA": 46.67,
    "HellaSwag": 75.07,
    "MT-Bench": 6.69,
    "LC win rate": 14.11,
}


def _paper(*values: float) -> dict[str, float]:
    return dict(zip(_PAPER_FULL, values, strict=True))


def _conclusions89(worse: str, what: str) -> tuple[Conclusion, ...]:
    return (
        Conclusion(f"{what} raises perplexity", (_FULL, worse), "LAMBADA perplexity", _LIKELIHOOD),
        Conclusion(f"{what} lowers what tasks measure", (_FULL, worse), "ARC-C", _TASKS),
    )


_DIFFERS89 = (
    _SIZE,
    "LAMBADA, MMLU and the judges are not at hand: held-out text and other zero-shot tasks stand for them",
)
_TABLE8 = PaperTable(
    title="Table 8: with and without attention init",
    paper={_FULL: _PAPER_FULL, _RANDOM: _paper(55.01, 26.21, 25.26, 34.01, 27.91, 1.04, 0.02)},
    rows=_table8,
    conclusions=_conclusions89(_RANDOM, "Leaving out the attention's weights"),
    differs=_DIFFERS89,
)
_TABLE9 = PaperTable(
    title="Table 9: with and without the Mamba layers",
    paper={_FULL: _PAPER_FULL, _REMOVED: _paper(151.98, 24.46, 21.93, 32.39, 27.91, 1.01, 0.0)},
    rows=_table9,
    conclusions=_conclusions89(_REMOVED, "Removing the Mamba layers"),
    differs=_DIFFERS89,
)

#: number of the table in the paper → how it is made again
TABLES = {6: _TABLE6, 7: _TABLE7, 8: _TABLE8, 9: _TABLE9}
