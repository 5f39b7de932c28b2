"""Log-probabilities of labels from hidden states through the output head, for training on text and on preferences.

Letters: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON, backends_on, check_chunk_size, check_shape, pick_backend
from mambify.ops.head_chunks import compute_dtype, default_chunk_size
from mambify.ops.linear_logprob import reference
from mambify.ops.linear_logprob.chunks import Plan, logp_of_positions

if HAS_TRITON:
    from mambify.ops.linear_logprob import triton as kernels

__all__ = ["linear_logprob"]


def linear_logprob(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log softmax(hidden @ headᵀ)[label] of each position, ``[N]`` in nats; 0 where a label is ``ignore_index``.

    Works through the positions in chunks, so logits are never held for more than a chunk. Differentiable with respect
    to the hidden states, each with an incoming gradient of its own; the head is frozen. The gradient up to that factor
    is made on the way forward and kept in place of the hidden states: as large, and in the dtype of the products.

    Products are in the dtype of the hidden states, or autocast's where it is on; logits and the result are float32
    (float64 for float64 hidden states): a logit rounded to bfloat16 would be off by up to 2⁻⁹ of its size, and a
    sequence adds up hundreds.

    Args:
        hidden_ND: after the final norm.
        labels_N: the token whose probability is asked for at each position.
        chunk_size: positions worked on at once; by default what keeps the logits within 256 MiB on a GPU, and within
            2²⁴ numbers on a CPU.
        backend: "auto", "reference" or "triton" (no float64).

    Raises:
        InvalidOptionError: unknown backend, a chunk size below 1, or a head that wants a gradient.
        ValueError: shapes that do not belong together.
    """
    positions, vocabulary = hidden_ND.shape[0], head_weight_VD.shape[0]
    check_shape("linear_logprob", "head_weight_VD", head_weight_VD, (vocabulary, hidden_ND.shape[1]))
    check_shape("linear_logprob", "labels_N", labels_N, (positions,))
    if torch.is_grad_enabled() and head_weight_VD.requires_grad:
        raise InvalidOptionError("linear_logprob: the head must be frozen; detach head_weight_VD or train without it")
    compute = compute_dtype(hidden_ND)
    exact = torch.float64 if compute == torch.float64 else torch.float32
    if chunk_size is None:
        chunk_size = default_chunk_size(positions, vocabulary, exact, hidden_ND.device)
    check_chunk_size("linear_logprob", chunk_size)
    chosen = pick_backend("linear_logprob", backend, backends_on(hidden_ND.device, supported=exact == torch.float32))
    plan = Plan(
        logp_of_logits=reference.logp_of_logits if chosen == "reference" else kernels.logp_of_logits,
        compute=compute,
        exact=exact,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    return logp_of_positions(plan, hidden_ND, head_weight_VD, labels_N)
