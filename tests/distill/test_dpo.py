"""The preference loss against its formula in float64, and against TRL where that is installed."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import mambify
from mambify.data.preferences import PreferenceDataset, read_preferences
from mambify.distill.dpo import PreferenceTuner, dpo_loss
from mambify.distill.stages import collate, collate_shortened
from mambify.model import HybridForCausalLM
from tiny import byte_tokenizer, llama

BETA, SMOOTHING, SFT, KL = 0.3, 0.2, 0.7, 0.4


@pytest.fixture
def models(tmp_path: Path) -> tuple[HybridForCausalLM, HybridForCausalLM]:
    """A student and a reference of other weights."""
    found = []
    for seed in (0, 1):
        llama(len(byte_tokenizer()), seed=seed).save_pretrained(tmp_path / str(seed))
        found.append(mambify.load(tmp_path / str(seed)).model)
    return found[0], found[1]


@pytest.fixture
def pairs(pairs_file: Path) -> PreferenceDataset:
    read = read_preferences(pairs_file, byte_tokenizer())
    return PreferenceDataset(read.pairs[:5], 48, dropped=read.dropped)


def _logps(model: HybridForCausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    """log p of every token but the first, given those before it, over the whole vocabulary: ``[T - 1, V]``."""
    logp_TV: torch.Tensor = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
    return logp_TV


def test_loss_and_gradient_are_the_formulas(
    models: tuple[HybridForCausalLM, HybridForCausalLM], pairs: PreferenceDataset
) -> None:
    """Pair by pair and token by token in float64, without padding, packing or chunks."""
    student, reference = (model.double() for model in models)
    tuner = PreferenceTuner(student, reference, beta=BETA, label_smoothing=SMOOTHING, sft_weight=SFT, kl_weight=KL)
    reference.requires_grad_(False)
    student.lm_head.requires_grad_(False)
    weight = student.model.layers[1].mlp.up_proj.weight
    batch = collate([pairs[i] for i in range(len(pairs))])
    found = tuner(**batch)
    (gradient,) = torch.autograd.grad(found.loss, weight)

    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs.pairs) / len(pairs)
    for pair in pairs.pairs:
        gains, kl, nll = [], [], []
        for document in (pair.chosen, pair.rejected):
            ids_T = torch.tensor(document.input_ids, dtype=torch.long)
            ours_TV, theirs_TV = _logps(student, ids_T), _logps(reference, ids_T).detach()
            answer = slice(document.loss_start - 1, None)
            picked = [x[answer].gather(1, ids_T[document.loss_start :, None]).sum() for x in (ours_TV, theirs_TV)]
            gains.append(picked[0] - picked[1])
            nll.append(-picked[0] / (len(document) - document.loss_start))
            kl.append((theirs_TV.exp() * (theirs_TV - ours_TV)).sum())
        margin = gains[0] - gains[1]
        preference = (1 - SMOOTHING) * F.softplus(-BETA * margin) + SMOOTHING * F.softplus(BETA * margin)
        total = total + preference + SFT * nll[0] + KL * sum(kl) / tokens
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(found.loss, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_a_pair_that_is_told_apart_costs_nothing_unless_smoothed() -> None:
    margin = torch.tensor([100.0, -100.0, 0.0], dtype=torch.float64)
    assert dpo_loss(margin, beta=1.0).tolist() == pytest.approx([0.0, 100.0, 0.6931471805599453])
    assert dpo_loss(margin, beta=1.0, label_smoothing=0.25).tolist() == pytest.approx([25.0, 75.0, 0.6931471805599453])


def test_padding_does_not_enter(models: tuple[HybridForCausalLM, HybridForCausalLM], pairs: PreferenceDataset) -> None:
    tuner = PreferenceTuner(*models, beta=BETA, kl_weight=KL, sft_weight=SFT)
    models[0].lm_head.requires_grad_(False)
    longer = PreferenceDataset(pairs.pairs, 200, dropped={})
    items = [longer[i] for i in range(len(longer))]
    shortened = collate_shortened(items)
    assert shortened["input_ids"].shape[-1] == shortened["labels"].shape[-1] == 64
    with torch.no_grad():
        expected = tuner(**collate([pairs[i] for i in range(len(pairs))]))
        for batch in (collate(items), shortened):
            found = tuner(**batch)
            torch.testing.assert_close(found.loss, expected.loss)
            for name, pair in expected.sums.items():
                torch.testing.assert_close(found.sums[name], pair, rtol=1e-4, atol=1e-4)


def test_trl_gives_the_same_loss_and_gradient(
    models: tuple[HybridForCausalLM, HybridForCausalLM], pairs: PreferenceDataset, tmp_path: Path
) -> None:
    for package in ("trl", "datasets"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install mambify[train]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import trl

        rows = [
            {
                "prompt_ids": pair.chosen.input_ids[: pair.chosen.loss_start].tolist(),
                "chosen_ids": pair.chosen.input_ids[pair.chosen.loss_start :].tolist(),
                "rejected_ids": pair.rejected.input_ids[pair.rejected.loss_start :].tolist(),
            }
            for pair in pairs.pairs
        ]
        text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=BETA, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False,
        )  # fmt: skip
        student, reference = (llama(len(byte_tokenizer()), seed=seed) for seed in (0, 1))
        trainer = trl.DPOTrainer(
            model=student, ref_model=reference, args=arguments, train_dataset=text, processing_class=byte_tokenizer()
        )
        expected = trainer.compute_loss(student, trainer.data_collator(rows))
        expected.backward()

    ours = models[0]
    ours.lm_head.requires_grad_(False)
    found = PreferenceTuner(*models, beta=BETA)(**collate([pairs[i] for i in range(len(pairs))]))
    (found.loss / len(pairs)).backward()
    torch.testing.assert_close(found.loss / len(pairs), expected, rtol=1e-4, atol=1e-5)
    theirs = student.model.layers[1].mlp.up_proj.weight.grad
    torch.testing.assert_close(ours.model.layers[1].mlp.up_proj.weight.grad, theirs, rtol=1e-3, atol=1e-5)
