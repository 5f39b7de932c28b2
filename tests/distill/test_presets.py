"""Presets: every one parses at any budget, keeps to it, and refuses what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from mambify.config import HybridConfig
from mambify.distill.arguments import training_arguments
from mambify.distill.presets import preset_names
from mambify.distill.recipe import Recipe, load_recipe
from mambify.distill.settings import Dpo, Sft
from mambify.distill.steps import steps_of
from mambify.errors import RecipeError

PUBLISHED = ("paper", "mohawk", "radlads")


def _preset(name: str, *changes: str, tokens: str = "20M") -> Recipe:
    return load_recipe(f"preset:{name}", [f"tokens={tokens}", "data.train=text", "output=run", *changes])


def test_all_of_them() -> None:
    assert set(preset_names()) == {"best", *PUBLISHED, *(f"{name}-tuned" for name in PUBLISHED)}


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("tokens", [2_000_000, 85_000_000])
@pytest.mark.parametrize("attention", [0.5, 0.0])
def test_every_preset_spends_its_budget_and_no_more(name: str, tokens: int, attention: float) -> None:
    recipe = _preset(name, f"student.attention={attention}", tokens=str(tokens))
    steps = steps_of(recipe, HybridConfig(num_hidden_layers=8))
    assert steps[-1].attention == attention
    spent = sum(step.stage.tokens // step.stage.batch_tokens * step.stage.batch_tokens for step in steps)
    assert tokens - len(steps) * 16384 <= spent <= tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_tuned_presets_differ_in_learning_rates_only(name: str) -> None:
    published, tuned = (
        _preset(preset, *(["instruct=i", "preferences=p"] if name == "paper" else []))
        for preset in (name, f"{name}-tuned")
    )
    for theirs, ours in zip(published.stages, tuned.stages, strict=True):
        assert ours.learning_rate > theirs.learning_rate
        assert ours == theirs.model_copy(update={"learning_rate": ours.learning_rate})
    assert tuned.model_copy(update={"stages": published.stages}) == published


def test_the_paper_goes_down_step_by_step_and_ends_with_preferences() -> None:
    assert _preset("paper").student.schedule == [0.5]
    assert _preset("paper", "student.attention=0.125").student.schedule == [0.5, 0.25, 0.125]
    whole = _preset("paper", "instruct=talk.jsonl", "preferences=pairs.jsonl")
    assert [stage.tokens for stage in whole.stages] == [16_000_000, 2_000_000, 2_000_000]
    assert [type(stage) for stage in whole.stages[1:]] == [Sft, Dpo]
    assert [whole.data_of(stage).train for stage in whole.stages] == ["text", "talk.jsonl", "pairs.jsonl"]
    assert len(_preset("paper", "instruct=talk.jsonl").stages) == 2


def test_shares_and_batches_can_be_changed() -> None:
    recipe = _preset("best", "stages.0.share=120", "batch_tokens=4k", "stages.1.batch_tokens=8k")
    assert [(stage.tokens, stage.batch_tokens) for stage in recipe.stages] == [(10_000_000, 4000), (10_000_000, 8000)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bset", "tokens=1M"], "no preset 'bset': did you mean 'best'"),
        (["best"], "needs a budget: tokens=20M"),
        (["best", "token=1M"], "unknown key 'token': did you mean 'tokens'"),
        (["best", "tokens=lots"], "write it like 500k"),
        (["best", "tokens=true"], "write it like 500k"),
        (["best", "tokens=20k"], "less than a batch of 16384"),
        (["best", "tokens=1M", "stages.0.tokens=5k"], "stage align has a share, not tokens"),
        (["best", "tokens=1M", "stages.0.share=0"], "must be above 0"),
        (["best", "tokens=1M", "instruct=x"], "no stage sft, which 'instruct' is the text of"),
        (["best", "tokens=1M", "stages.0.learning_rat=1"], "did you mean 'learning_rate'"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    name, *changes = arguments
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"preset:{name}", ["data.train=t", "output=o", *changes])


def test_text_and_output_are_the_users_to_give() -> None:
    with pytest.raises(RecipeError, match="preset:best: data: Field required"):
        load_recipe("preset:best", ["tokens=1M", "output=o"])


def test_the_rate_falls_over_the_last_steps_only() -> None:
    recipe = _preset("mohawk", "stages.2.decay=0.25", tokens="6M")
    arguments = training_arguments(recipe.stages[2], recipe, Path("run"), device="cpu")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.warmup_steps,
        num_training_steps=arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(arguments.max_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert sum(rate < 1 for rate in rates) == pytest.approx((0.1 + 0.25) * arguments.max_steps, abs=3)
    assert 0 <= rates[-1] < 0.05
