"""Log-probabilities through the output head on a GPU, at the vocabulary of a real model, against float64 on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mambify.ops.linear_logprob import linear_logprob

# NaN in every allocation comes with PyTorch's deterministic mode, which warns of scatter_add and cuBLAS on a GPU.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]

IGNORE = -100
POSITIONS, WIDTH, VOCABULARY = 300, 64, 49_152


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    labels: Tensor
    weights: Tensor


def inputs(dtype: torch.dtype, vocabulary: int = VOCABULARY, positions: int = POSITIONS) -> Inputs:
    """On the GPU; logits have a spread of about 3."""
    hidden = torch.randn(positions, WIDTH).to("cuda", dtype)
    head = (3 * torch.randn(vocabulary, WIDTH) / WIDTH**0.5).to("cuda", dtype)
    labels = torch.randint(0, vocabulary, (positions,))
    labels[::7] = IGNORE
    return Inputs(hidden, head, labels.cuda(), torch.randn(positions).cuda())


def oracle(given: Inputs) -> tuple[Tensor, Tensor]:
    """Values and gradient in float64 on the CPU."""
    hidden, head, labels, weights = (x.cpu().double() if x.is_floating_point() else x.cpu() for x in given)
    hidden = hidden.requires_grad_()
    kept = labels != IGNORE
    logp = (hidden @ head.T).log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0] * kept
    (gradient,) = torch.autograd.grad((weights * logp).sum(), hidden)
    return logp.detach(), gradient


def errors(given: Inputs, **options: Any) -> tuple[float, float]:
    """Of the log-probabilities, largest in nats, and of the gradient, relative."""
    hidden = given.hidden.detach().requires_grad_()
    logp = linear_logprob(hidden, given.head, given.labels, **options)
    (gradient,) = torch.autograd.grad((given.weights * logp).sum(), hidden)
    assert logp.dtype == torch.float32 and gradient.dtype == hidden.dtype
    expected, wanted = oracle(given)
    ignored = (given.labels == IGNORE).cpu()
    assert (logp.cpu()[ignored] == 0).all() and (gradient.cpu()[ignored] == 0).all()
    error = (gradient.cpu().double() - wanted).norm() / wanted.norm()
    return float((logp.detach().cpu().double() - expected).abs().max()), float(error)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradient(dtype: torch.dtype, backend: str) -> None:
    of_logp, of_gradient = errors(inputs(dtype), chunk_size=128, backend=backend)
    assert of_logp < 5e-5  # logits are float32 in every dtype
    assert of_gradient < (2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("vocabulary", [50_257, 128_256, 32_000, 777])
def test_vocabularies_that_leave_part_of_a_block(vocabulary: int) -> None:
    of_logp, of_gradient = errors(inputs(torch.bfloat16, vocabulary, positions=70), chunk_size=32)
    assert of_logp < 5e-5 and of_gradient < 1.6e-2


def test_recorded_as_a_graph() -> None:
    """Nothing waits for the device; the replay takes new inputs, and a new set of ignored positions."""
    static = inputs(torch.bfloat16)
    hidden = static.hidden.detach().requires_grad_()

    def step() -> list[Tensor]:
        logp = linear_logprob(hidden, static.head, static.labels, chunk_size=128)
        return [logp, *torch.autograd.grad((static.weights * logp).sum(), hidden)]

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
        hidden.copy_(hidden.flip(0) * 0.9)
        static.labels.copy_(static.labels.roll(3))
        static.weights.copy_(static.weights.roll(1))
    graph.replay()
    found = [x.detach().clone() for x in recorded]
    for value, wanted in zip(found, step(), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, wanted.detach())


def test_memory_is_that_of_a_chunk() -> None:
    """8192 positions of 49,152 logits would be 1.6 GB in float32."""
    given = inputs(torch.bfloat16, positions=8192)
    hidden = given.hidden.detach().requires_grad_()
    linear_logprob(hidden, *given[1:3]).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(hidden, *given[1:3]).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**28 + 64 * 2**20
