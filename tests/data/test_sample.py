from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from mambify.data.sample import _draw, _invert_distribution, sample_continuations
from mambify.ops.draw import settings_of
from mambify.ops.draw.reference import weights


def test_the_draw_follows_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 150) * 2
    logits[0, ::3] = -torch.inf
    rows = 60_000
    counts = torch.bincount(_invert_distribution(logits.repeat(rows, 1)), minlength=150)
    expected = logits.softmax(-1)[0] * rows
    assert counts[::3].sum() == 0
    likely = expected > 5
    chi2 = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert 0.5 < chi2 / likely.sum() < 1.6


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 10])
def test_every_size_of_vocabulary_is_covered_to_its_last_token(size: int) -> None:
    for token in range(size):
        logits = torch.full((5, size), -torch.inf)
        logits[:, token] = 0.0
        assert _invert_distribution(logits).tolist() == [token] * 5


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().repeat(4000, 1)
    assert set(_draw(logits.clone(), temperature=1.0, top_p=1.0, top_k=2).tolist()) == {1, 3}
    assert set(_draw(logits.clone(), temperature=1.0, top_p=0.6, top_k=2).tolist()) == {1}
    assert set(_draw(logits.clone(), temperature=1.0, top_p=0.75, top_k=0).tolist()) == {1, 3}
    assert set(_draw(logits.clone(), temperature=1.0, top_p=0.76, top_k=0).tolist()) == {1, 2, 3}
    assert set(_draw(logits.clone(), temperature=1.0, top_p=1e-6, top_k=0).tolist()) == {1}
    assert set(_draw(logits.clone(), temperature=0.01, top_p=1.0, top_k=0).tolist()) == {1}


def greedy(model: LlamaForCausalLM, prompt: list[int], length: int, stops: set[int]) -> list[int]:
    """Without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(length):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.6), (5, 0.9), (1, 0.5), (0, 1e-6)])
def test_equals_are_kept_or_cut_together_as_on_a_gpu(top_k: int, top_p: float) -> None:
    """The law of the engine's slots, whose logits in bfloat16 are often equal."""
    torch.manual_seed(0)
    row = torch.tensor([0.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, -4.0])
    rows = 20_000
    settings = settings_of(temperature=0.9, top_k=top_k, top_p=top_p, min_p=0.0, rows=1, device=row.device)
    expected = weights(row[None], settings)[0]
    found = _draw(row.repeat(rows, 1), temperature=0.9, top_p=top_p, top_k=top_k)
    shares = torch.bincount(found, minlength=len(row)) / rows
    assert (shares - expected / expected.sum()).abs().max() < 0.02
    assert shares[expected == 0].sum() == 0


def test_padded_batches_with_rows_that_end_early_equal_one_row_at_a_time(model: LlamaForCausalLM) -> None:
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15], [1, 2, 3, 4], [20], [21, 30]]
    lone = [greedy(model, prompt, 24, set()) for prompt in prompts]
    stops = {lone[0][3], lone[2][9], lone[5][1]}  # some rows end, at different steps
    expected = [greedy(model, prompt, 24, stops) for prompt in prompts]
    assert len({len(row) for row in expected}) > 2
    # top_k=1 leaves one token to draw: sampling becomes greedy.
    assert sample_continuations(model, prompts, max_new_tokens=24, stop_ids=stops, top_k=1) == expected


def test_the_first_token_is_drawn_from_the_model(model: LlamaForCausalLM) -> None:
    prompt = [5, 6, 7]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    rows = sample_continuations(model, [prompt] * 20_000, max_new_tokens=1, stop_ids=[])
    seen = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(expected)) / 20_000
    assert (seen - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_sampled_text_is_as_surprising_as_the_model_says(model: LlamaForCausalLM) -> None:
    """Over text drawn from p, -log p(token) minus the entropy of p is zero on average."""
    torch.manual_seed(0)
    rows = sample_continuations(model, [[5, 6]] * 100 + [[7]] * 100, max_new_tokens=40, stop_ids=[2])
    surplus = []
    for prompt, row in zip([[5, 6]] * 100 + [[7]] * 100, rows, strict=True):
        with torch.inference_mode():
            logp = model(input_ids=torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        surplus.append(-logp.gather(1, torch.tensor(row)[:, None])[:, 0] + (logp.exp() * logp).sum(-1))
    values = torch.cat(surplus)
    assert len(values) > 2000
    assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5


def test_a_generation_config_of_the_model_has_no_say(model: LlamaForCausalLM) -> None:
    prompts = [[5, 6]] * 8
    torch.manual_seed(3)
    plain = sample_continuations(model, prompts, max_new_tokens=12, stop_ids=[2])
    before = model.generation_config.repetition_penalty, model.generation_config.top_k
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 1
    try:
        torch.manual_seed(3)
        assert sample_continuations(model, prompts, max_new_tokens=12, stop_ids=[2]) == plain
    finally:
        model.generation_config.repetition_penalty, model.generation_config.top_k = before
