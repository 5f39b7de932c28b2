"""Muon: orthogonal steps for matrices, AdamW's for all else, and a state that continues."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mambify.conversion import apply_plan, plan
from mambify.distill.muon import Muon, orthogonalised
from mambify.distill.stages import parameter_groups, stage_module
from mambify.errors import RecipeError
from mambify.families.load import load
from mambify.workflows.distill import distill


def groups(module: nn.Module, **common: Any) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.dim() == 2]
    rest = [p for p in module.parameters() if p.dim() != 2]
    return [{"params": matrices, "muon": True, **common}, {"params": rest, **common}]


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(5, 12, 40), (3, 40, 12), (1, 16, 16)])
def test_singular_values_become_one(shape: tuple[int, int, int]) -> None:
    matrices = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None, None]
    )
    result = orthogonalised(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    # The same singular vectors: the polar factor's inner product with the matrix is its nuclear norm.
    reached = (result * matrices).sum((1, 2)) / torch.linalg.svdvals(matrices).sum(-1)
    assert (reached - 1).abs().max() < 0.2


def test_a_step_is_as_large_as_adamws() -> None:
    module = nn.Linear(48, 96, bias=False)
    before = module.weight.detach().clone()
    give_gradients(module, 0)
    Muon(groups(module), lr=0.01).step()
    rms = (module.weight.detach() - before).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.2 * 0.01, rel=0.25)


def test_all_else_is_adamw() -> None:
    ours = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    theirs = copy.deepcopy(ours)
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon(groups(ours), **settings)
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.dim() != 2], betas=(0.9, 0.95), **settings)
    for step in range(5):
        for module, optimizer in ((ours, muon), (theirs, adamw)):
            give_gradients(module, step)
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.dim() != 2:
            torch.testing.assert_close(mine, reference)
        else:
            assert not torch.equal(mine, reference)


def test_matrices_decay_and_shapes_do_not_mix() -> None:
    """Each matrix takes the step that it would take alone."""
    module = nn.ModuleList([nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False)])
    alone = copy.deepcopy(module)
    together = Muon(groups(module), lr=0.1, weight_decay=0.5)
    single = [Muon(groups(layer), lr=0.1, weight_decay=0.5) for layer in alone]
    for step in range(3):
        give_gradients(module, step)
        give_gradients(alone, step)
        together.step()
        for optimizer in single:
            optimizer.step()
    for mine, reference in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)
    free = nn.Linear(8, 12, bias=False)
    free.weight.grad = torch.zeros_like(free.weight)
    before = free.weight.detach().clone()
    Muon(groups(free), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(free.weight.detach(), before * 0.95)


def test_the_state_continues() -> None:
    module = nn.Linear(6, 10)
    optimizer = Muon(groups(module), lr=0.05)
    for step in range(3):
        give_gradients(module, step)
        optimizer.step()
    other = copy.deepcopy(module)
    continued = Muon(groups(other), lr=1.0)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        for target, stepper in ((module, optimizer), (other, continued)):
            give_gradients(target, step)
            stepper.step()
    for mine, reference in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([{"params": list(nn.LayerNorm(4).parameters()), "muon": True}])
    module = nn.Linear(3, 3)
    before = [p.detach().clone() for p in module.parameters()]
    Muon(groups(module)).step()  # no gradients: nothing moves
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_recipe_trains_matrices_with_it(make_recipe: Any, teacher_directory: Path, mixer: str) -> None:
    stage = {"kind": "kd", "tokens": 512, "batch_tokens": 128, "optimizer": "muon", "mlp_learning_rate": 1e-4}
    recipe = make_recipe(stages=[stage])
    teacher = load(teacher_directory).model
    student = apply_plan(teacher, plan(teacher.config, mixer=mixer, attention=0.5))
    module = stage_module(recipe.stages[0], student, teacher)
    found = parameter_groups(recipe.stages[0], module)
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    kinds = {(group["lr"], group.get("muon", False)) for group in found}
    assert kinds == {(1e-3, True), (1e-3, False), (1e-4, True)}
    for group in found:
        assert all((id(p) in weights) == group.get("muon", False) for p in group["params"])
    with pytest.raises(RecipeError, match="exclude each other"):
        distill(make_recipe(stages=[stage | {"trainer": {"optim": "sgd"}}]), device="cpu")
