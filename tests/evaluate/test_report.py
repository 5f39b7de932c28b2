"""The report page: complete, self-contained, honest about what is missing, and closed to injection."""

from __future__ import annotations

import json
import math
import random
import re
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from mambify.errors import InvalidOptionError
from mambify.evaluate.report import render_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


def made_up_report() -> dict[str, Any]:
    """A report of the size and shape a run writes. Every number in it is made up."""
    rng = random.Random(0)
    converted = [i for i in range(30) if i % 4 != 3][:22]
    align = [
        {
            "step": s,
            "tokens": s * 4096,
            "loss": 1.1 * math.exp(-s / 40) + 0.21 + rng.gauss(0, 0.03),
            "lr": 2e-3,
        }
        for s in range(1, 161)
    ]
    kd = [
        {"step": s, "tokens": s * 4096, "loss": 1.6 * s**-0.5 + 0.12 + rng.gauss(0, 0.02), "lr": 1e-3}
        for s in range(1, 241)
    ]
    return {
        "title": "SmolLM2-135M-Instruct, three quarters Mamba2",
        "created": "2030-01-02 03:04 UTC",
        "device": "a made-up device, 2 cores",
        "versions": {"mambify": "0.0.0", "torch": "0.0.0", "transformers": "0.0.0", "python": "3.11.7"},
        "teacher": {
            "name": "SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "perplexity": 12.85,
            "kv_bytes": {2048: 47_185_920, 32768: 754_974_720, 131072: 3_019_898_880},
        },
        "student": {
            "perplexity": 15.22,
            "kl": 0.1842,
            "top1_agreement": 0.7671,
            "parameters_new": 9_812_224,
            "parameters_kept": 121_060_224,
            "state_bytes": {2048: 22_020_096, 32768: 210_763_776, 131072: 814_743_552},
            "layer_types": ["mamba2" if i in converted else "attention" for i in range(30)],
            "intervals": {
                "level": 0.95,
                "perplexity": [15.01, 15.44],
                "kl": [0.1794, 0.1891],
                "top1_agreement": [0.7612, 0.7733],
            },
        },
        "table": [
            {"model": "teacher", "perplexity": 12.85, "KL": None, "agreement": None, "MiB": 720},
            {"model": "untrained", "perplexity": 48213.2, "KL": 8.1, "agreement": 0.003, "MiB": 201},
            {"model": "student", "perplexity": 15.22, "KL": 0.1842, "agreement": 0.7671, "MiB": 201},
        ],
        "stages": [
            {"name": "align", "seconds": 134.0, "tokens": 655_360, "history": align},
            {"name": "kd", "seconds": 322.0, "tokens": 983_040, "history": kd},
        ],
        "alignment": {
            layer: [
                [
                    s,
                    (0.9 + rng.random() * 0.3) * math.exp(-s / 35) + 0.08 + 0.22 * layer / 30 + 0.01 * rng.random(),
                ]
                for s in range(0, 161, 10)
            ]
            for layer in converted
        },
        "text_scores": {
            "held-out chat": {
                "teacher_perplexity": 12.34,
                "student_perplexity": 14.6,
                "kl": 0.171,
                "top1_agreement": 0.774,
            },
            "held-out plain text": {
                "teacher_perplexity": 13.4,
                "student_perplexity": 16.1,
                "kl": 0.197,
                "top1_agreement": 0.759,
            },
            "my-notes.txt": {"teacher_perplexity": 25.8, "student_perplexity": 53.9},
        },
        "samples": [
            {
                "prompt": "Explain in two sentences why the sky is blue.",
                "teacher": "The sky is blue because air scatters short wavelengths of sunlight more than "
                "long ones. This is called Rayleigh scattering.",
                "student": "The sky is blue because the light of the sun is scattered by air, and blue light "
                "is scattered the most.\n\nThis is known as Rayleigh scattering.",
            },
            {
                "prompt": "Write a function that reverses a string.",
                "teacher": "def reverse(text):\n    return text[::-1]\n\nThis slices with a step of -1.",
                "student": "def reverse(s):\n    return s[::-1]",
            },
        ],
        "settings": {
            "mixer": "mamba2",
            "attention": 0.25,
            "seed": 0,
            "data": {"tokens": 1_600_000, "chat_share": 0.5, "context": 512},
            "align": {"learning_rate": 2e-3, "batch_size": 8},
            "kd": {"learning_rate": 1e-3, "temperature": 1.0, "freeze_mlp": True},
        },
    }


class Page(HTMLParser):
    """Tags in order, the text, and a check that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of place"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str, class_: str | None = None) -> int:
        return sum(
            name == tag and (class_ is None or class_ in (attributes.get("class") or "").split())
            for name, attributes in self.tags
        )


@pytest.fixture
def report() -> dict[str, Any]:
    return made_up_report()


def test_the_whole_page_is_well_formed_and_says_what_the_report_holds(report: dict[str, Any]) -> None:
    page = Page(render_report(report))
    assert page.open == []
    for said in (
        "22 of the 30 attention layers of SmolLM2-135M-Instruct became Mamba2 mixers.",
        "1.18× 15.22 against 12.85 95% interval 15.0–15.4",
        "0.184 nats a token",
        "76.7%",
        "27.9% 201 MiB instead of 720 MiB",
        "655 k tokens · 2 min 14 s · 4.9 k tokens/s",
        "attention, kept from the teacher (8)",
        "my-notes.txt 25.80 53.90 2.09× – –",
        "return s[::-1]",
        "kd.freeze_mlp true",
        "untrained 48,213 8.1 0.003 201",
    ):
        assert said in page.text, said
    assert page.count("li", "kept") == 8
    assert page.count("li", "new") == 22
    assert page.count("svg", "plot") == 4
    assert page.count("section") == 7


def test_it_loads_nothing_and_runs_nothing(report: dict[str, Any]) -> None:
    html = render_report(report)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img|javascript:", html, re.IGNORECASE)
    assert "default-src 'none'" in html


def test_every_chart_has_a_name_and_its_numbers(report: dict[str, Any]) -> None:
    page = Page(render_report(report))
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert all(attributes.get("aria-label") for attributes in charts)
    assert len(charts) == 4
    assert page.count("details") == 3  # the bars' table serves both alignment charts


def test_one_h1_and_no_level_skipped(report: dict[str, Any]) -> None:
    levels = [int(tag[1]) for tag, _ in Page(render_report(report)).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_are_unique_and_every_link_has_its_target(report: dict[str, Any]) -> None:
    page = Page(render_report(report))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    assert links
    assert all(link.removeprefix("#") in ids for link in links)


def test_coordinates_stay_inside_the_plot(report: dict[str, Any]) -> None:
    for tag, attributes in Page(render_report(report)).tags:
        if tag == "polyline":
            points = [float(v) for v in str(attributes["points"]).replace(",", " ").split()]
            assert all(0 <= v <= 1000 for v in points)
        if tag == "rect":
            assert 0 <= float(str(attributes["height"]).rstrip("%")) <= 100


def test_a_report_from_json_renders_the_same(report: dict[str, Any]) -> None:
    assert render_report(json.loads(json.dumps(report))) == render_report(report)


def test_a_title_alone_is_a_page_without_claims() -> None:
    page = Page(render_report({"title": "Only a title"}))
    assert page.text.startswith("Only a title Only a title Made by mambify")
    assert page.count("section") == 0
    assert not re.search(r"\d", page.text)


@pytest.mark.parametrize("title", [None, ""])
def test_a_report_without_a_title_is_refused(title: str | None) -> None:
    with pytest.raises(InvalidOptionError, match="title"):
        render_report({"title": title})


@pytest.mark.parametrize("key", sorted(set(made_up_report()) - {"title"}))
@pytest.mark.parametrize("absent", ["missing", "empty", "none"])
def test_any_part_may_be_absent(report: dict[str, Any], key: str, absent: str) -> None:
    if absent == "missing":
        del report[key]
    else:
        report[key] = None if absent == "none" else type(report[key])()
    page = Page(render_report(report))
    assert page.open == []
    assert not re.search(r"\b(None|nan|NaN|inf)\b", page.text)


def test_a_number_that_is_nan_is_left_out_not_shown(report: dict[str, Any]) -> None:
    report["student"]["perplexity"] = math.nan
    report["student"]["kl"] = math.inf
    report["stages"][0]["history"][3]["loss"] = math.nan
    report["alignment"][0][0][1] = math.nan
    text = Page(render_report(report)).text
    assert "student ÷ teacher" not in text
    assert "KL to the teacher" not in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_stage_with_one_logged_value_has_no_curve(report: dict[str, Any]) -> None:
    report["stages"] = [{"name": "align", "history": [{"step": 1, "loss": 0.5}]}]
    report["alignment"] = {"3": [[0, 0.4]]}
    page = Page(render_report(report))
    assert page.count("polyline") == 0
    assert page.count("rect") == 2


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.0, 0.0], [1e-9, 3.0], [-1.0, 2.0], [1e4, 9e8]])
def test_a_curve_of_any_range_is_drawn(values: list[float]) -> None:
    history = [{"step": i, "loss": v} for i, v in enumerate(values)]
    page = Page(render_report({"title": "t", "stages": [{"name": "kd", "history": history}]}))
    points = next(str(a["points"]) for tag, a in page.tags if tag == "polyline")
    assert all(0 <= float(v) <= 1000 for v in points.replace(",", " ").split())


def poisoned(value: Any, poison: str) -> Any:
    """The same report with every text and every key that is free text carrying markup."""
    if isinstance(value, dict):
        return {key: poisoned(item, poison) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    return value + poison if isinstance(value, str) else value


def test_markup_in_any_text_stays_text(report: dict[str, Any]) -> None:
    poison = """</title></style><script>alert(1)</script><img src=x onerror='a()'>" onmouseover="b()" '&lt;"""
    bad = poisoned(report, poison)
    for key in ("text_scores", "settings", "versions", "alignment"):
        bad[key] = {f"{name}{poison}": item for name, item in bad[key].items()}
    bad["table"] = [{f"{name}{poison}": item for name, item in row.items()} for row in bad["table"]]
    page, clean = Page(render_report(bad)), Page(render_report(report))
    assert page.open == []
    assert [tag for tag, _ in page.tags if tag in {"script", "img"}] == []
    assert {name for _, attributes in page.tags for name in attributes} == {
        name for _, attributes in clean.tags for name in attributes
    }
    assert poison in "".join(page.texts)


def test_rendering_does_not_change_the_report(report: dict[str, Any]) -> None:
    before = deepcopy(report)
    render_report(report)
    assert report == before
