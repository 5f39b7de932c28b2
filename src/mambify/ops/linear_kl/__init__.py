"""The loss of a student's next-token distribution against a teacher's, from hidden states through the output heads.

Letters: M positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON, backends_on, check_chunk_size, check_shape, pick_backend
from mambify.ops.head_chunks import compute_dtype, default_chunk_size
from mambify.ops.linear_kl import reference
from mambify.ops.linear_kl.chunks import LinearKL, Plan, sums_over_positions

if HAS_TRITON:
    from mambify.ops.linear_kl import triton as kernels

__all__ = ["LinearKL", "linear_kl"]


def linear_kl(
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    labels_M: Tensor,
    *,
    kl_weight: float = 1.0,
    reverse_kl_weight: float = 0.0,
    ce_weight: float = 0.0,
    tv_weight: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> LinearKL:
    """The weighted sum of KL(teacher ‖ student), KL(student ‖ teacher), cross-entropy and total variation.

    Over all positions, of each with the temperature τ: kl_weight · τ² · KL(teacher_τ ‖ student_τ)
    + reverse_kl_weight · τ² · KL(student_τ ‖ teacher_τ) + ce_weight · (−log student(label))
    + tv_weight · ½ Σ_v |student_τ(v) − teacher_τ(v)|.

    The last is the total variation, 1 − Σ_v min(student_τ, teacher_τ): the chance that speculative decoding at
    temperature τ refuses what the student drafts for the teacher (arXiv 2211.17192), and one of the losses of
    DistillSpec (arXiv 2310.08461). It is that chance itself, without τ², so its gradient has a factor of 1/τ. This
    gradient has a step where the two give a token the same probability: rounding can move it by all of the step.

    Works through the positions in chunks and makes the gradient on the way forward, so logits are never held for more
    than a chunk. Differentiable are ``total`` with respect to the student's hidden states and head; the teacher is
    taken as constant. Without gradients to make, only the sums are computed.

    A logit rounded to bfloat16 is off by up to 2⁻⁹ of its size. Between two models that adds 5e-4 nats or more to KL
    and noise to the gradient that reaches the hidden states: 8 to 12% of its norm at a KL of 0.05, 23 to 35% at 0.005
    (SmolLM2-135M on text). So:

    - Where both heads are one tensor, the student's logits are the teacher's plus (student − teacher) · headᵀ, and only
      this difference is rounded against the teacher: 2% of the gradient's norm at either KL, no bias, no more bytes.
    - Where they are two, logits are kept in float32: 20 to 28 bytes moved for each in place of 12 to 16.

    Args:
        student_MD, teacher_MD: hidden states after the final norm.
        student_head_VD, teacher_head_VD: output heads; may be one tensor.
        labels_M: the next token at each position; positions labelled ``ignore_index`` do not count.
        reverse_kl_weight: of the reverse KL, which punishes what the teacher would not say; not computed where 0.
        tv_weight: of the total variation, for a student that is to draft; not computed where 0.
        temperature: both distributions are softened by it in either KL (Hinton et al., 2015) and in the variation.
        chunk_size: positions worked on at once; by default what keeps a tensor of logits within 256 MiB on a GPU, and
            within 2²⁴ numbers on a CPU.
        logits_dtype: what logits are kept in between the product with the head and the loss: the dtype of that product
            (autocast's where it is on, else that of the student's hidden states) or float32. None: the former where
            both heads are one tensor, else float32. A difference from the teacher is always in the former.
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend, a temperature that is not positive, a chunk size below 1, or another dtype.
        ValueError: shapes that do not belong together.
    """
    positions, vocabulary = student_MD.shape[0], student_head_VD.shape[0]
    check_shape("linear_kl", "student_head_VD", student_head_VD, (vocabulary, student_MD.shape[1]))
    check_shape("linear_kl", "teacher_MD", teacher_MD, (positions, teacher_MD.shape[1]))
    check_shape("linear_kl", "teacher_head_VD", teacher_head_VD, (vocabulary, teacher_MD.shape[1]))
    check_shape("linear_kl", "labels_M", labels_M, (positions,))
    if not temperature > 0:
        raise InvalidOptionError(f"linear_kl: temperature must be positive, got {temperature}")
    compute = compute_dtype(student_MD)
    choices = (compute, torch.float32) if compute.itemsize < 4 else (compute,)
    difference = len(choices) > 1 and _same_tensor(student_head_VD, teacher_head_VD)
    if logits_dtype is None:
        logits_dtype = compute if difference else choices[-1]
    elif logits_dtype not in choices:
        raise InvalidOptionError(
            f"linear_kl: logits_dtype must be {' or '.join(map(str, choices))}, got {logits_dtype}"
        )
    if chunk_size is None:
        chunk_size = default_chunk_size(positions, vocabulary, logits_dtype, student_MD.device)
    check_chunk_size("linear_kl", chunk_size)
    supported = compute in (torch.float32, torch.bfloat16, torch.float16)
    chosen = pick_backend("linear_kl", backend, backends_on(student_MD.device, supported=supported))
    plan = Plan(
        objective=reference.Objective(
            float(kl_weight),
            float(reverse_kl_weight),
            float(ce_weight),
            float(tv_weight),
            float(temperature),
            ignore_index,
        ),
        loss_of_logits=reference.loss_of_logits if chosen == "reference" else kernels.loss_of_logits,
        compute=compute,
        teacher_logits=logits_dtype,
        student_logits=compute if difference else logits_dtype,
        difference=difference,
        chunk_size=chunk_size,
    )
    return sums_over_positions(plan, student_MD, student_head_VD, teacher_MD, teacher_head_VD, labels_M)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers at the same place."""
    same_layout = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return a is b or (same_layout and a.device == b.device and a.data_ptr() == b.data_ptr())
