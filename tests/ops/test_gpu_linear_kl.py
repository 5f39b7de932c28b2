"""The loss through the output heads on a GPU, at the vocabulary of a real model, against float64 on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.ops import head_chunks
from mambify.ops.linear_kl import linear_kl, reference

# NaN in every allocation comes with PyTorch's deterministic mode, which warns of scatter_add and cuBLAS on a GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

IGNORE = -100
POSITIONS, WIDTH, VOCABULARY = 300, 64, 49_152
Weights = tuple[float, float, float, float, float]  # kl_weight, reverse_kl_weight, ce_weight, tv_weight, temperature
FORWARD: Weights = (1.0, 0.0, 0.0, 0.0, 1.0)
OBJECTIVES: list[Weights] = [
    FORWARD,
    (0.5, 0.0, 0.5, 0.0, 1.0),
    (0.5, 0.0, 0.5, 0.0, 2.0),
    (0.0, 1.0, 0.0, 0.0, 1.0),
    (0.5, 0.7, 0.3, 0.0, 2.0),
    (0.0, 0.0, 0.0, 1.0, 1.0),
    (0.5, 0.7, 0.3, 0.6, 2.0),
]


class Inputs(NamedTuple):
    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor


def inputs(dtype: torch.dtype, one_head: bool, vocabulary: int = VOCABULARY, positions: int = POSITIONS) -> Inputs:
    """On the GPU; logits have a spread of about 3, and the KL is about 0.3 nats a position."""
    teacher = torch.randn(positions, WIDTH)
    student = teacher + 0.3 * torch.randn(positions, WIDTH)
    head = 3 * torch.randn(vocabulary, WIDTH) / WIDTH**0.5
    other = head if one_head else head + 0.1 * torch.randn(vocabulary, WIDTH)
    labels = torch.randint(0, vocabulary, (positions,))
    labels[::7] = IGNORE
    on_gpu = [x.to("cuda", dtype) for x in (student, head, teacher, other)]
    if one_head:
        on_gpu[3] = on_gpu[1]
    return Inputs(*on_gpu, labels.cuda())


def oracle(
    given: Inputs, kl_weight: float, reverse_kl_weight: float, ce_weight: float, tv_weight: float, temperature: float
) -> dict[str, Tensor]:
    """Sums and gradients in float64 on the CPU."""
    *floats, labels = (x.cpu() for x in given)
    student, head, teacher, teacher_head = (x.double() for x in floats)
    objective = reference.Objective(kl_weight, reverse_kl_weight, ce_weight, tv_weight, temperature, IGNORE)
    rows, grad = reference.loss_of_logits(
        student @ head.T, teacher @ teacher_head.T, labels, objective, difference=False, gradient=torch.float64
    )
    assert grad is not None
    kl, ce, agreement, *others = rows.sum(1)
    reverse_kl = others[0] if reverse_kl_weight else torch.zeros_like(kl)
    tv = others[-1] if tv_weight else torch.zeros_like(kl)
    total = kl_weight * kl + reverse_kl_weight * reverse_kl + ce_weight * ce + tv_weight * tv
    found = {"total": total, "kl": kl, "reverse_kl": reverse_kl, "ce": ce, "tv": tv, "agreement": agreement}
    return found | {"hidden": grad @ head, "head": grad.T @ student}


def measured(given: Inputs, **options: Any) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in given[:2]]
    teacher_head = leaves[1] if given.teacher_head is given.student_head else given.teacher_head
    result = linear_kl(*leaves, given.teacher, teacher_head, given.labels, **options)
    grads = torch.autograd.grad(result.total, leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]
    parts = ("kl", "reverse_kl", "ce", "tv", "agreement")
    found = {"total": result.total.detach()} | {k: getattr(result, k) for k in parts}
    return {k: v.cpu().double() for k, v in (found | {"hidden": grads[0], "head": grads[1]}).items()}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {k: float((found[k] - v).norm() / v.norm().clamp(min=1e-9)) for k, v in expected.items()}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("one_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, one_head: bool, objective: Weights, backend: str) -> None:
    given = inputs(dtype, one_head)
    names = ("kl_weight", "reverse_kl_weight", "ce_weight", "tv_weight", "temperature")
    options = dict(zip(names, objective, strict=True))
    found = measured(given, **options, chunk_size=128, backend=backend)
    errors = relative_errors(found, oracle(given, *objective))
    agreement = errors.pop("agreement")
    sums, unit = [k for k in errors if k not in ("hidden", "head")], torch.finfo(dtype).eps
    if objective[3] and (one_head or dtype == torch.float32):
        # The total variation's gradient has a step where two probabilities meet. Rounding moves a share of the tokens
        # across it that grows with the last bit, each by the whole step, twice its gradient: twice the root.
        assert max(errors[k] for k in sums) < max(unit, 2e-5), errors
        assert max(errors[k] for k in ("hidden", "head")) < 2 * unit**0.5, errors
        return
    if dtype == torch.float32:
        assert max(errors.values()) < 2e-5, errors
        assert agreement == 0
        return
    # Sums: of unrounded logits (two heads) or of a rounded difference. Gradients are rounded themselves.
    assert max(errors[k] for k in sums) < (unit if one_head else 2e-5), errors
    assert max(errors[k] for k in ("hidden", "head")) < (5 if one_head else 1) * unit, errors
    assert agreement < (0.15 if one_head else 1e-9)  # near ties of the rounded teacher fall either way


@pytest.mark.parametrize("vocabulary", [50_257, 128_256, 32_000, 777])
@pytest.mark.parametrize("one_head", [True, False])
@pytest.mark.parametrize(("reverse_kl_weight", "tv_weight"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_vocabularies_that_leave_part_of_a_block(
    vocabulary: int, one_head: bool, reverse_kl_weight: float, tv_weight: float
) -> None:
    given = inputs(torch.bfloat16, one_head, vocabulary, positions=70)
    found = measured(given, ce_weight=0.5, reverse_kl_weight=reverse_kl_weight, tv_weight=tv_weight, chunk_size=32)
    errors = relative_errors(found, oracle(given, 1.0, reverse_kl_weight, 0.5, tv_weight, 1.0))
    assert max(errors[k] for k in ("total", "kl", "reverse_kl", "ce", "tv")) < 8e-3, errors
    assert max(errors[k] for k in ("hidden", "head")) < (0.09 if tv_weight else 4e-2), errors  # see above, of its steps


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_in_a_dtype_that_was_asked_for(logits_dtype: torch.dtype) -> None:
    given = inputs(torch.bfloat16, one_head=False)
    errors = relative_errors(measured(given, logits_dtype=logits_dtype), oracle(given, *FORWARD))
    rounded = logits_dtype == torch.bfloat16
    assert (errors["kl"] > 1e-4) == rounded, errors
    assert (errors["hidden"] > 1e-2) == rounded, errors
    assert errors["kl"] < 0.02 and errors["hidden"] < 0.1, errors


def test_a_product_in_float32_is_not_rounded() -> None:
    a, b = torch.randn(130, 64).cuda().bfloat16(), torch.randn(64, 1003).cuda().bfloat16()
    out = torch.empty(130, 1024, device="cuda")[:, :1003]
    product = head_chunks.product(a, b, out)
    assert product.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_under_autocast() -> None:
    given = inputs(torch.float32, one_head=True)
    with torch.autocast("cuda", torch.bfloat16):
        found = measured(given, ce_weight=0.5)
    errors = relative_errors(found, oracle(given, 1.0, 0.0, 0.5, 0.0, 1.0))
    assert 1e-5 < errors["kl"] < 0.02 and errors["hidden"] < 0.05, errors


def test_results_are_the_same_every_time() -> None:
    given = inputs(torch.bfloat16, one_head=True)
    first, second = (measured(given, ce_weight=0.5, chunk_size=100) for _ in range(2))
    assert all(first[k].equal(second[k]) for k in first)


def test_ignored_positions_have_no_gradient() -> None:
    given = inputs(torch.bfloat16, one_head=True)
    hidden = measured(given, ce_weight=0.5)["hidden"]
    ignored = (given.labels == IGNORE).cpu()
    assert (hidden[ignored] == 0).all()
    assert (hidden[~ignored].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"reverse_kl_weight": 0.5}, {"tv_weight": 0.5}], ids=str)
@pytest.mark.parametrize("one_head", [True, False])
def test_recorded_as_a_graph(one_head: bool, options: dict[str, float]) -> None:
    """Nothing waits for the device; the replay takes new inputs, and a new set of ignored positions."""
    static = inputs(torch.bfloat16, one_head)
    student = static.student.detach().requires_grad_()

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            result = linear_kl(student, *static[1:], ce_weight=0.5, chunk_size=128, **options)
            return [*result, *torch.autograd.grad(result.total / 7, student)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")  # PyTorch raises where the host would wait for the device
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()

    with torch.no_grad():
        student.copy_(student.flip(0))
        static.teacher.copy_(static.teacher.flip(0) * 0.9)
        static.labels.copy_(static.labels.roll(3))
    graph.replay()
    found = [x.detach().clone() for x in recorded]
    expected = step()
    for value, wanted in zip(found, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, wanted.detach())


def test_memory_is_that_of_a_chunk() -> None:
    """8192 positions of 49,152 logits would be 805 MB in bfloat16 for each model."""
    given = inputs(torch.bfloat16, one_head=True, positions=8192)
    student = given.student.detach().requires_grad_()
    linear_kl(student, *given[1:]).total.backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_kl(student, *given[1:]).total.backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**28 + 64 * 2**20


def test_cross_entropy_is_that_of_torch() -> None:
    given = inputs(torch.float32, one_head=False)
    expected = F.cross_entropy(
        (given.student @ given.student_head.T).double(), given.labels, ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(linear_kl(*given, ce_weight=1.0).ce.double(), expected, rtol=1e-5, atol=0.0)
