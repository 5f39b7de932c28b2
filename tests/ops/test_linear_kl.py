"""The loss through the output heads against the plain one in float64: values, every gradient, masks, chunks, dtypes."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.errors import InvalidOptionError
from mambify.ops import head_chunks
from mambify.ops.backends import HAS_TRITON
from mambify.ops.linear_kl import linear_kl, reference
from mambify.ops.linear_kl.reference import Objective

if HAS_TRITON:
    from mambify.ops.linear_kl import triton as kernels

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NaN in every allocation comes with PyTorch's deterministic mode, which warns of scatter_add and cuBLAS on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")

IGNORE = -100
Weights = tuple[float, float, float, float, float]  # kl_weight, reverse_kl_weight, ce_weight, tv_weight, temperature
FORWARD: Weights = (1.0, 0.0, 0.0, 0.0, 1.0)
OF_TWO: Weights = (0.3, 0.0, 1.0, 0.0, 0.7)
OF_ALL: Weights = (0.3, 0.8, 1.0, 0.6, 0.7)
OBJECTIVES: list[Weights] = [
    FORWARD,
    (1.0, 0.0, 0.0, 0.0, 2.0),
    (0.3, 0.0, 1.0, 0.0, 1.0),
    OF_TWO,
    (0.0, 0.0, 1.0, 0.0, 1.0),
    (0.0, 1.0, 0.0, 0.0, 1.0),
    (0.0, 1.0, 0.0, 0.0, 2.0),
    (0.5, 0.5, 0.0, 0.0, 1.0),
    (0.0, 0.7, 0.4, 0.0, 1.0),
    (0.3, 0.8, 1.0, 0.0, 0.7),
    OF_ALL,
]
# the total variation alone and beside every choice of the others, at two temperatures
OF_VARIATION: list[Weights] = [
    (*others, 0.6, temperature)
    for others in itertools.product((0.0, 0.3), (0.0, 0.8), (0.0, 1.0))
    for temperature in (1.0, 1.7)
]


class Inputs(NamedTuple):
    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def inputs(positions: int = 13, width: int = 8, vocabulary: int = 29, ignored: tuple[int, ...] = (0, 4, 12)) -> Inputs:
    student, teacher = torch.randn(positions, width), torch.randn(positions, width)
    heads = [torch.randn(vocabulary, width) for _ in range(2)]
    labels = torch.randint(0, vocabulary, (positions,))
    labels[list(ignored)] = IGNORE
    return Inputs(*(x.to(DEVICE) for x in (student, heads[0], teacher, heads[1], labels)))


def oracle(
    given: Inputs, kl_weight: float, reverse_kl_weight: float, ce_weight: float, tv_weight: float, temperature: float
) -> dict[str, Tensor]:
    """Sums and gradients, in float64, from the logits of all positions."""
    student, head, teacher, teacher_head, labels = given.to(torch.float64)
    student, head = student.detach().requires_grad_(), head.detach().requires_grad_()
    kept = labels != IGNORE
    s, t = student @ head.T, teacher @ teacher_head.T
    logp, logq = (x.div(temperature).log_softmax(-1) for x in (s, t))
    kl, reverse = (
        F.kl_div(of, to, log_target=True, reduction="none").sum(-1)[kept].sum() * temperature**2
        for of, to in ((logp, logq), (logq, logp))
    )
    ce = F.cross_entropy(s, labels, ignore_index=IGNORE, reduction="sum")
    tv = (1 - torch.minimum(logp.exp(), logq.exp()).sum(-1))[kept].sum()
    total = kl_weight * kl + reverse_kl_weight * reverse + ce_weight * ce + tv_weight * tv
    hidden_grad, head_grad = torch.autograd.grad(total, [student, head])
    agreement = (s.argmax(-1) == t.argmax(-1))[kept].sum()
    found = {"total": total, "kl": kl, "agreement": agreement, "count": kept.sum()}
    asked = {"reverse_kl": (reverse, reverse_kl_weight), "ce": (ce, ce_weight), "tv": (tv, tv_weight)}
    found |= {name: value if weight else 0 * value for name, (value, weight) in asked.items()}
    return {k: v.detach().double() for k, v in (found | {"hidden": hidden_grad, "head": head_grad}).items()}


def measured(given: Inputs, factor: float = 1.0, train_head: bool = True, **options: Any) -> dict[str, Tensor]:
    """The same from ``linear_kl``; gradients are those of ``factor · total``."""
    student = given.student.detach().requires_grad_()
    head = given.student_head.detach().requires_grad_(train_head)
    result = linear_kl(student, head, *given[2:], **options)
    found = dict(zip(("total", "kl", "reverse_kl", "ce", "tv", "agreement", "count"), result, strict=True))
    wanted = {"hidden": student} | ({"head": head} if train_head else {})
    grads = torch.autograd.grad(factor * result.total, list(wanted.values()))
    for name, grad in zip(wanted, grads, strict=True):
        assert grad.dtype == wanted[name].dtype
        found[name] = grad / factor
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in found.items():
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1.0)
        assert error < tolerance, f"{name}: {error}"


def weights(objective: Weights) -> dict[str, float]:
    names = ("kl_weight", "reverse_kl_weight", "ce_weight", "tv_weight", "temperature")
    return dict(zip(names, objective, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64])
@pytest.mark.parametrize("objective", [*OBJECTIVES, *OF_VARIATION], ids=str)
def test_values_and_gradients(backend: str, chunk_size: int, objective: Weights) -> None:
    given = inputs()
    options = weights(objective) | {"chunk_size": chunk_size, "backend": backend}
    close(measured(given, factor=3.0, **options), oracle(given, *objective), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 2, 1003, 4096, 4101])
@pytest.mark.parametrize("objective", [FORWARD, OF_TWO, OF_VARIATION[0], OF_ALL], ids=str)
def test_any_vocabulary(backend: str, vocabulary: int, objective: Weights) -> None:
    """Kernels work in blocks of up to 2048 columns: less than one, whole ones, and some left over."""
    given = inputs(positions=5, vocabulary=vocabulary, ignored=(2,))
    close(measured(given, **weights(objective), backend=backend), oracle(given, *objective), 5e-6)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *OF_VARIATION], ids=str)
def test_reference_in_float64(objective: Weights) -> None:
    given = inputs().to(torch.float64)
    found = measured(given, **weights(objective), chunk_size=4)
    assert all(value.dtype == torch.float64 for value in found.values())
    close(found, oracle(given, *objective), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [FORWARD, OF_TWO, OF_VARIATION[0], OF_ALL], ids=str)
def test_ignored_positions_count_nothing(backend: str, objective: Weights) -> None:
    given = inputs()
    kept = given.labels != IGNORE
    alone = Inputs(given.student[kept], given.student_head, given.teacher[kept], given.teacher_head, given.labels[kept])
    found = measured(given, **weights(objective), chunk_size=5, backend=backend)
    assert (found["hidden"][~kept] == 0).all()
    assert (found["hidden"][kept].norm(dim=-1) > 0).all()
    expected = oracle(alone, *objective)
    expected["hidden"] = torch.zeros_like(found["hidden"], dtype=torch.float64).index_put_((kept,), expected["hidden"])
    close(found, expected, 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counted(backend: str) -> None:
    given = inputs(positions=3, ignored=(0, 1, 2))
    assert not any(x.any() for x in measured(given, ce_weight=1.0, backend=backend).values())
    empty = Inputs(given.student[:0], given.student_head, given.teacher[:0], given.teacher_head, given.labels[:0])
    found = measured(empty, ce_weight=1.0, backend=backend)
    assert found["hidden"].shape == (0, 8)
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "head"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(
    backend: str, hidden: bool, head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, asked = loss_of_logits(backend), []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["gradient"])
        return inner(*args, **options)

    monkeypatch.setattr(reference if backend == "reference" else kernels, "loss_of_logits", spy)
    given = inputs()
    expected = oracle(given, 1.0, 0.0, 0.5, 0.0, 1.0)
    student, student_head = given.student.requires_grad_(hidden), given.student_head.requires_grad_(head)
    leaves = {k: v for k, v in {"hidden": student, "head": student_head}.items() if v.requires_grad}
    result = linear_kl(student, student_head, *given[2:], ce_weight=0.5, backend=backend)
    assert asked == [torch.float32 if hidden or head else None]
    assert not any(x.requires_grad for x in result[1:])
    found = {"total": result.total.detach(), "kl": result.kl, "ce": result.ce, "agreement": result.agreement}
    if leaves:
        found |= dict(zip(leaves, torch.autograd.grad(result.total, list(leaves.values())), strict=True))
    else:
        assert not result.total.requires_grad
    close(found, expected, 5e-6)

    asked.clear()
    with torch.no_grad():
        result = linear_kl(student, student_head, *given[2:], ce_weight=0.5, backend=backend)
    assert asked == [None]
    assert not result.total.requires_grad
    close({"total": result.total, "agreement": result.agreement}, expected, 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_strided_views(backend: str) -> None:
    given = inputs()
    wide = [torch.cat([x, torch.full_like(x, torch.nan)], -1)[:, :8] for x in given[:4]]
    labels = torch.stack([given.labels, given.labels], 1)[:, 0]
    assert not wide[0].is_contiguous() and not labels.is_contiguous()
    found = measured(Inputs(*wide, labels), ce_weight=1.0, chunk_size=5, backend=backend)
    close(found, oracle(given, 1.0, 0.0, 1.0, 0.0, 1.0), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_agrees_with_itself(backend: str) -> None:
    student, head, _, _, labels = inputs()
    result = linear_kl(student, head, student, head, labels, chunk_size=4, backend=backend)
    assert abs(float(result.kl)) < 1e-5
    assert result.agreement == result.num_positions == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_total_variation_of_a_model_and_itself_pulls_nowhere(backend: str) -> None:
    """Every token is a tie, whichever way its probability is rounded."""
    student, head, _, _, labels = inputs()
    hidden = measured(
        Inputs(student, head, student, head, labels), kl_weight=0.0, tv_weight=1.0, train_head=False, backend=backend
    )
    assert hidden["tv"] == hidden["total"] == 0
    assert not hidden["hidden"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_distributions_that_share_nothing_vary_totally(backend: str) -> None:
    student, teacher = torch.full((1, 29), -1e4), torch.full((1, 29), -1e4)
    student[0, 3], teacher[0, 20] = 1e4, 1e4
    objective = Objective(0.0, 0.0, 0.0, 1.0, 1.0, IGNORE)
    labels = torch.zeros(1, dtype=torch.long, device=DEVICE)
    rows, grad = loss_of_logits(backend)(
        student.to(DEVICE), teacher.to(DEVICE), labels, objective, difference=False, gradient=torch.float32
    )
    assert rows[3].tolist() == [1.0]
    assert grad is not None and not grad.any()  # a softmax that is sure of one token has no slope


def loss_of_logits(backend: str) -> Any:
    return (reference if backend == "reference" else kernels).loss_of_logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tv_weight", [0.0, 0.6])
@pytest.mark.parametrize("reverse_kl_weight", [0.0, 0.7])
def test_logits_of_any_size_and_order(backend: str, reverse_kl_weight: float, tv_weight: float) -> None:
    """Sums are kept relative to the largest logit so far, which here is met first, last, or far from all others."""
    rising = torch.linspace(-300, 300, 4101)
    spike = torch.zeros(4101)
    spike[4100] = 1e4
    student = torch.stack([rising, rising.flip(0), spike, rising + 3e4, spike, torch.full((4101,), -2e4)])
    teacher = torch.stack([rising.flip(0), rising * 0.9, spike, rising, rising / 100, spike])
    labels = torch.tensor([5, 4100, 0, 4100, 4100, 4100])
    objective = Objective(1.0, reverse_kl_weight, 0.5, tv_weight, 1.0, IGNORE)
    expected, wanted = reference.loss_of_logits(
        student.double(), teacher.double(), labels, objective, difference=False, gradient=torch.float64
    )
    found, grad = loss_of_logits(backend)(
        student.clone().to(DEVICE), teacher.to(DEVICE), labels.to(DEVICE), objective, difference=False,
        gradient=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-6, atol=5e-3)  # 3e4 has a last bit of 2e-3
    # The reverse KL's has the factor s − t − Σ p (s − t): a difference of what may be large.
    gap_C1 = (student - teacher).abs().amax(-1, keepdim=True).double()
    bound_CV = 1e-6 + 3e-6 * wanted.abs() + reverse_kl_weight * student.double().softmax(-1) * 4e-7 * gap_C1
    assert ((grad.cpu().double() - wanted).abs() <= bound_CV).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_several_likeliest_tokens_the_first_counts(backend: str) -> None:
    vocabulary = 4101
    student, teacher = torch.zeros(4, vocabulary), torch.zeros(4, vocabulary)
    student[0, [7, 2055]], teacher[0, [7, 30]] = 1.0, 1.0  # 7 + 2048: the same lane of the kernel
    student[1, [30, 7]], teacher[1, [30, 4100]] = 1.0, 1.0
    student[2, [2055, 2048, 4100]], teacher[2, [2048, 4096]] = 1.0, 1.0
    teacher[3, 1] = 1.0
    labels = torch.zeros(4, dtype=torch.long, device=DEVICE)
    found, grad = loss_of_logits(backend)(
        student.to(DEVICE),
        teacher.to(DEVICE),
        labels,
        Objective(*FORWARD, IGNORE),
        difference=False,
        gradient=None,
    )
    assert grad is None
    assert found[2].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize(("reverse_kl_weight", "tv_weight"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.4), (0.6, 0.4)])
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "gradient"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_kernel_on_rounded_logits(
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    gradient: torch.dtype,
    reverse_kl_weight: float,
    tv_weight: float,
    difference: bool,
) -> None:
    """Rows are of a wider buffer, whose other columns are neither read nor written."""
    vocabulary, wide = 1003, 1024
    student, teacher = (4 * torch.randn(5, wide, device=DEVICE) for _ in range(2))
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    student[:, vocabulary:], teacher[:, vocabulary:] = torch.nan, torch.nan
    student_CV, teacher_CV = student[:, :vocabulary], teacher[:, :vocabulary]
    labels = torch.tensor([0, 1002, IGNORE, 7, 500], device=DEVICE)
    objective = Objective(0.5, reverse_kl_weight, 0.7, tv_weight, 1.0, IGNORE)
    expected, wanted = reference.loss_of_logits(
        student_CV.double(), teacher_CV.double(), labels, objective, difference=difference, gradient=torch.float64
    )
    found, grad = kernels.loss_of_logits(
        student_CV, teacher_CV, labels, objective, difference=difference, gradient=gradient
    )
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)
    assert grad is not None and grad.dtype == gradient and grad.shape == student_CV.shape
    assert (grad.data_ptr() == student.data_ptr()) == (student_dtype == gradient)
    assert student[:, vocabulary:].isnan().all()
    # a last bit, since Triton's interpreter rounds bfloat16 towards zero; float16 has no numbers between 0 and 6e-8
    torch.testing.assert_close(grad.double(), wanted, rtol=torch.finfo(gradient).eps, atol=1e-7)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("label", [-1, 29, 10**12])
def test_a_label_beyond_the_vocabulary_is_not_passed_over(label: int) -> None:
    given = inputs()
    given.labels[3] = label
    result = linear_kl(*given, ce_weight=1.0, backend="triton")
    assert result.ce.isnan()


def errors(given: Inputs, **options: Any) -> tuple[float, float]:
    """Relative errors of the KL and of the gradient of the hidden states."""
    expected = oracle(given, *FORWARD)
    found = measured(given, train_head=False, **options)
    kl = (found["kl"] - expected["kl"]).abs() / expected["kl"]
    grad = (found["hidden"].double() - expected["hidden"]).norm() / expected["hidden"].norm()
    return float(kl), float(grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logits_of_close_models(backend: str) -> None:
    """One head: the difference is rounded, not the logits. Two heads: they are not rounded at all, unless asked for."""
    positions, width, vocabulary = 24, 32, 300
    teacher = torch.randn(positions, width)
    head = torch.randn(vocabulary, width).bfloat16().to(DEVICE)
    student = (teacher + 0.02 * torch.randn(positions, width)).bfloat16().to(DEVICE)
    teacher, labels = teacher.bfloat16().to(DEVICE), torch.zeros(positions, dtype=torch.long, device=DEVICE)
    shared = Inputs(student, head, teacher, head, labels)
    two = shared._replace(teacher_head=head.clone())
    bfloat16 = {"logits_dtype": torch.bfloat16, "backend": backend}
    of_shared, of_two = errors(shared, backend=backend), errors(two, backend=backend)
    of_rounded = errors(two, **bfloat16)
    assert max(of_shared) < 0.03 < 3 * 0.03 < min(of_rounded)
    assert of_two[0] < 1e-4 and of_two[1] < 5e-3  # the gradient is rounded; Triton's interpreter rounds towards zero
    assert errors(shared, **bfloat16) == of_shared
    precise = errors(shared, logits_dtype=torch.float32, backend=backend)
    assert precise[0] < 3e-3 and precise[1] < 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_head", [True, False])
def test_under_autocast(backend: str, one_head: bool) -> None:
    given = inputs(width=32)
    if one_head:
        given = given._replace(teacher_head=given.student_head)
    exact = measured(given, backend=backend, ce_weight=0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = measured(given, backend=backend, ce_weight=0.5)
    for name in ("kl", "ce", "hidden", "head"):
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 1e-5 < error < 0.05, name
    # The total variation's errors cancel over positions, and its gradient has steps that rounding moves tokens across.
    exact = measured(given, backend=backend, tv_weight=0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = measured(given, backend=backend, tv_weight=0.5)
    assert rounded["tv"].dtype == torch.float32
    torch.testing.assert_close(rounded["tv"], exact["tv"], rtol=0.01, atol=0.0)
    assert not rounded["hidden"].equal(exact["hidden"])


def test_the_factor_of_the_loss_is_not_rounded() -> None:
    given = inputs().to(torch.bfloat16)
    student = given.student.requires_grad_()
    total = linear_kl(student, *given[1:]).total
    (once,) = torch.autograd.grad(total, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(total / 3000, student)
    assert scaled.equal((once.float() * (torch.ones_like(total) / 3000)).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "cuda"}, "backend"),
        ({"logits_dtype": torch.bfloat16}, "logits_dtype must be torch.float32"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        linear_kl(*inputs(), **options)


def test_float64_has_no_kernel() -> None:
    with pytest.raises(InvalidOptionError, match="backend"):
        linear_kl(*inputs().to(torch.float64), backend="triton")


@pytest.mark.parametrize("place", range(5))
def test_shapes_that_do_not_belong_together(place: int) -> None:
    given = list(inputs())
    given[place] = given[place][:-1]
    with pytest.raises(ValueError, match="linear_kl"):
        linear_kl(*given)


@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 2**22])
@pytest.mark.parametrize("positions", [0, 1, 127, 8192, 65_536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunks_on_a_gpu(positions: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Whole tiles of 128 rows, within 256 MiB where a tile is, and of about one size."""
    size = head_chunks.default_chunk_size(positions, vocabulary, dtype, torch.device("cuda"))
    assert size >= 128 and size % 128 == 0
    assert size == 128 or size * vocabulary * dtype.itemsize <= 2**28
    number = -(-positions // size)
    assert positions > (size - 128 - number) * number or number <= 1
    assert number == 0 or positions - (number - 1) * size > 0
