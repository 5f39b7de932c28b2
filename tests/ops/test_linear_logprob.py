"""Log-probabilities through the output head against the plain ones in float64: values, gradients, masks, chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON
from mambify.ops.linear_logprob import linear_logprob, reference

if HAS_TRITON:
    from mambify.ops.linear_logprob import triton as kernels

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NaN in every allocation comes with PyTorch's deterministic mode, which warns of scatter_add and cuBLAS on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")

IGNORE = -100


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor  # what comes in going backward, other at every position

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def inputs(positions: int = 13, width: int = 8, vocabulary: int = 29, ignored: tuple[int, ...] = (0, 4, 12)) -> Inputs:
    labels = torch.randint(0, vocabulary, (positions,))
    labels[list(ignored)] = IGNORE
    given = torch.randn(positions, width), torch.randn(vocabulary, width), labels, torch.randn(positions)
    return Inputs(*(x.to(DEVICE) for x in given))


def oracle(given: Inputs) -> tuple[Tensor, Tensor]:
    """Values and gradient of Σ weight · logp, in float64, from the logits of all positions."""
    hidden, head, labels, weights = given.to(torch.float64)
    hidden = hidden.detach().requires_grad_()
    kept = labels != IGNORE
    logp = (hidden @ head.T).log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0] * kept
    (gradient,) = torch.autograd.grad((weights * logp).sum(), hidden)
    return logp.detach(), gradient


def measured(given: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    hidden = given.hidden.detach().requires_grad_()
    logp = linear_logprob(hidden, given.head, given.labels, **options)
    (gradient,) = torch.autograd.grad((given.weights * logp).sum(), hidden)
    assert gradient.dtype == hidden.dtype
    return logp.detach(), gradient


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for value, wanted in zip(found, expected, strict=True):
        error = (value.double() - wanted).norm() / wanted.norm().clamp(min=1.0)
        assert error < tolerance, error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64, None])
def test_values_and_gradient(backend: str, chunk_size: int | None) -> None:
    given = inputs()
    found = measured(given, chunk_size=chunk_size, backend=backend)
    assert found[0].dtype == torch.float32
    close(found, oracle(given), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 2, 1003, 4096, 4101])
def test_any_vocabulary(backend: str, vocabulary: int) -> None:
    given = inputs(positions=5, vocabulary=vocabulary, ignored=(2,))
    close(measured(given, backend=backend), oracle(given), 3e-6)


def test_reference_in_float64() -> None:
    given = inputs().to(torch.float64)
    found = measured(given, chunk_size=4)
    assert found[0].dtype == torch.float64
    close(found, oracle(given), 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_positions_are_zero(backend: str) -> None:
    given = inputs()
    logp, gradient = measured(given, chunk_size=5, backend=backend)
    ignored = given.labels == IGNORE
    assert (logp[ignored] == 0).all() and (gradient[ignored] == 0).all()
    assert (logp[~ignored] < 0).all() and (gradient[~ignored].norm(dim=-1) > 0).all()
    other = given._replace(labels=given.labels.where(~ignored, -1))
    torch.testing.assert_close(measured(other, ignore_index=-1, backend=backend), (logp, gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_asked_for(backend: str) -> None:
    assert not any(x.any() for x in measured(inputs(positions=3, ignored=(0, 1, 2)), backend=backend))
    logp, gradient = measured(inputs(positions=0, ignored=()), backend=backend)
    assert logp.shape == (0,) and gradient.shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("trained", "recorded"), [(True, True), (True, False), (False, True)])
def test_a_gradient_is_made_only_where_wanted(
    backend: str, trained: bool, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = reference if backend == "reference" else kernels
    inner, asked = module.logp_of_logits, []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["gradient"])
        return inner(*args, **options)

    monkeypatch.setattr(module, "logp_of_logits", spy)
    given = inputs()
    with torch.set_grad_enabled(recorded):
        logp = linear_logprob(given.hidden.requires_grad_(trained), given.head, given.labels, backend=backend)
    assert logp.requires_grad == (trained and recorded)
    assert asked == [torch.float32 if trained and recorded else None]
    torch.testing.assert_close(logp.detach().double(), oracle(given)[0], rtol=1e-6, atol=1e-6)


def logp_of_logits(backend: str) -> Any:
    return (reference if backend == "reference" else kernels).logp_of_logits


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_and_order(backend: str) -> None:
    """Sums are kept relative to the largest logit so far, which here is met first, last, or far from all others."""
    rising = torch.linspace(-300, 300, 8197)
    spike = torch.zeros(8197)
    spike[8196] = 1e4
    logits = torch.stack([rising, rising.flip(0), spike, rising + 3e4, spike, torch.full((8197,), -2e4)])
    labels = torch.tensor([5, 8196, 0, 8196, 8196, 8196])
    expected, wanted = reference.logp_of_logits(logits.double(), labels, IGNORE, gradient=torch.float64)
    found, grad = logp_of_logits(backend)(logits.clone().to(DEVICE), labels.to(DEVICE), IGNORE, gradient=torch.float32)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-6, atol=5e-3)  # 3e4 has a last bit of 2e-3
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("vocabulary", [1003, 5003])
@pytest.mark.parametrize("gradient", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_in_other_dtypes(dtype: torch.dtype, gradient: torch.dtype, vocabulary: int) -> None:
    """Rows are of a wider buffer, whose other columns are neither read nor written."""
    wide = (4 * torch.randn(5, vocabulary + 21, device=DEVICE)).to(dtype)
    wide[:, vocabulary:] = torch.nan
    logits = wide[:, :vocabulary]
    labels = torch.tensor([0, vocabulary - 1, IGNORE, 7, 500], device=DEVICE)
    expected, wanted = reference.logp_of_logits(logits.double(), labels, IGNORE, gradient=torch.float64)
    found, grad = kernels.logp_of_logits(logits, labels, IGNORE, gradient=gradient)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)
    assert grad is not None and grad.dtype == gradient
    assert (grad.data_ptr() == wide.data_ptr()) == (dtype == gradient)
    assert wide[:, vocabulary:].isnan().all()
    # a last bit, since Triton's interpreter rounds bfloat16 towards zero; float16 has no numbers between 0 and 6e-8
    torch.testing.assert_close(grad.double(), wanted, rtol=max(torch.finfo(gradient).eps, 3e-6), atol=1e-7)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("label", [-1, 29, 10**12])
def test_a_label_beyond_the_vocabulary_is_not_passed_over(label: int) -> None:
    given = inputs()
    given.labels[3] = label
    logp = linear_logprob(*given[:3], backend="triton")
    assert logp.isnan().nonzero().flatten().tolist() == [3]


def test_float64_has_no_kernel() -> None:
    with pytest.raises(InvalidOptionError, match="backend"):
        linear_logprob(*inputs().to(torch.float64)[:3], backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_not_contiguous(backend: str) -> None:
    given = inputs()
    hidden, head = (torch.cat([x, torch.full_like(x, torch.nan)], -1)[:, :8] for x in given[:2])
    labels = torch.stack([given.labels, given.labels], 1)[:, 0]
    assert not hidden.is_contiguous() and not labels.is_contiguous()
    close(measured(Inputs(hidden, head, labels, given.weights), chunk_size=5, backend=backend), oracle(given), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_hidden_states_have_exact_logits(backend: str) -> None:
    """What is rounded is the gradient of the logits and the result's own last bit; no logit is."""
    given = inputs(width=64, vocabulary=300).to(torch.bfloat16)
    given = given._replace(weights=given.weights.float())
    logp, gradient = measured(given, backend=backend)
    expected, wanted = oracle(given)
    assert logp.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=1e-5)
    assert (gradient.double() - wanted).norm() / wanted.norm() < 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend: str) -> None:
    given = inputs(width=32)
    exact = oracle(given)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded = measured(given, backend=backend)
    for value, wanted in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        assert 1e-5 < (value - wanted).norm() / wanted.norm() < 0.03


def test_a_real_model_finds_text_as_likely_as_its_logits_say(smollm2: LoadedModel) -> None:
    tokens = smollm2.tokenizer("The capital of France is Paris, and that of Italy is Rome.", return_tensors="pt")
    ids = tokens["input_ids"]
    with torch.no_grad():
        logits = smollm2.model(ids).logits[0, :-1].double()
        hidden = smollm2.model.model(ids).last_hidden_state[0, :-1]
    found = linear_logprob(hidden, smollm2.model.lm_head.weight.detach(), ids[0, 1:], chunk_size=4)
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-4)
    assert -4.0 < found.mean() < -1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk_size": 0}, "chunk_size"), ({"backend": "cuda"}, "backend"), ({"backend": "referense"}, "did you mean")],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    given = inputs()
    with pytest.raises(InvalidOptionError, match=message):
        linear_logprob(*given[:3], **options)


def test_a_head_that_trains_is_refused() -> None:
    given = inputs()
    given.head.requires_grad_()
    with pytest.raises(InvalidOptionError, match="must be frozen"):
        linear_logprob(*given[:3])
    with torch.no_grad():
        assert linear_logprob(*given[:3]).shape == (13,)


@pytest.mark.parametrize("place", range(3))
def test_shapes_that_do_not_belong_together(place: int) -> None:
    given = list(inputs()[:3])
    given[place] = given[place][..., :-1]
    with pytest.raises(ValueError, match="linear_logprob"):
        linear_logprob(*given)
