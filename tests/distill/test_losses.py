"""The chunked head loss against the plain one in float64: values, gradients, masks, chunk edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.distill.losses import IGNORE, head_loss, next_token_labels, normalized_mse

M, D, V = 13, 8, 29


def _inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(M, D, generator=generator, dtype=torch.float64) for _ in range(2))
    heads = [torch.randn(V, D, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[[0, 4, 12]] = IGNORE
    return student, heads[0], teacher, heads[1], labels


def _plain(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    kept = labels != IGNORE
    p = F.log_softmax(student @ head.T / t, -1)
    q = F.log_softmax(teacher @ teacher_head.T / t, -1)
    kl = F.kl_div(p, q, log_target=True, reduction="none").sum(-1)[kept].sum() * t**2
    ce = F.cross_entropy(student @ head.T, labels, ignore_index=IGNORE, reduction="sum")
    return kl, ce


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64])
@pytest.mark.parametrize(("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.3, 1.0, 2.0), (0.0, 1.0, 1.0)])
def test_values_and_gradients(chunk_size: int, kl_weight: float, ce_weight: float, temperature: float) -> None:
    student, head, teacher, teacher_head, labels = _inputs()
    kl, ce = _plain(student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels, temperature)
    wanted = torch.autograd.grad(kl_weight * kl + ce_weight * ce, [student, head])

    ours = [x.detach().float().requires_grad_() for x in (student, head)]
    result = head_loss(
        ours[0],
        ours[1],
        teacher.float(),
        teacher_head.float(),
        labels,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(3 * result.total, ours)
    torch.testing.assert_close(result.kl.double(), kl.detach(), rtol=1e-4, atol=1e-4)
    if ce_weight:
        torch.testing.assert_close(result.ce.double(), ce.detach(), rtol=1e-4, atol=1e-4)
    assert result.num_positions == 10
    for ours_grad, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours_grad.double(), 3 * expected, rtol=1e-3, atol=1e-4)


def test_masked_positions_have_no_gradient() -> None:
    student, head, teacher, teacher_head, labels = _inputs()
    student = student.float().requires_grad_()
    result = head_loss(student, head.float(), teacher.float(), teacher_head.float(), labels, ce_weight=1.0)
    (gradient,) = torch.autograd.grad(result.total, student)
    assert (gradient[labels == IGNORE] == 0).all()
    assert (gradient[labels != IGNORE].abs().sum(-1) > 0).all()


def test_a_model_agrees_with_itself() -> None:
    student, head, _, _, labels = _inputs()
    result = head_loss(student, head, student, head, labels, chunk_size=4)
    assert abs(float(result.kl)) < 1e-5
    assert result.agreement == result.num_positions


def test_bfloat16_under_autocast_is_close() -> None:
    student, head, teacher, teacher_head, labels = (x.float() if x.is_floating_point() else x for x in _inputs())
    exact = head_loss(student, head, teacher, teacher_head, labels).kl
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_loss(student, head, teacher, teacher_head, labels).kl
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_next_token_labels_shift_and_drop_the_last() -> None:
    labels = torch.tensor([[5, 6, 7], [8, IGNORE, 9]])
    assert next_token_labels(labels).tolist() == [6, 7, IGNORE, IGNORE, 9, IGNORE]


def test_normalized_mse_is_one_for_silence_and_zero_for_truth() -> None:
    target = torch.randn(2, 3, 4)
    assert float(normalized_mse(torch.zeros_like(target), target)) == pytest.approx(1.0)
    assert float(normalized_mse(target.clone(), target)) == 0.0
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    noisy = torch.where(mask[..., None].bool(), target, 100.0)
    assert float(normalized_mse(noisy, target, mask)) == 0.0
