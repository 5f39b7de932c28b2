"""Mamba1's selective scan over sub-heads that have their own B and C.

Letters: B batch, T tokens, J sub-heads, M channels a sub-head (usually 16), N state size.
"""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_chunk_size, check_shape, pick_backend
from mambify.ops.selective_scan import reference

if HAS_TRITON:
    from mambify.ops.selective_scan import triton as kernels

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    x_BTJM: Tensor,
    dt_BTJM: Tensor,
    A_JMN: Tensor,
    B_BTJN: Tensor,
    C_BTJN: Tensor,
    D_JM: Tensor | None = None,
    *,
    initial_state_BJMN: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    chunk_size: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs Mamba1's recurrence over T tokens at once (arXiv 2312.00752, algorithm 2), for every sub-head j:

        S_t = exp(Δ_t A) ∘ S_{t-1} + (Δ_t x_t) B_tᵀ        y_t = S_t C_t + D x_t

    Grouped key/value heads are the caller's to expand: ``x`` and ``B`` come with all J sub-heads (an expanded
    view will do).

    Args:
        x_BTJM: values. Sets the dtype of ``y``; everything inside is float32 (float64 for float64 inputs).
        dt_BTJM: step sizes Δ ≥ 0, after softplus, one a channel.
        A_JMN: decay rates, A ≤ 0.
        B_BTJN, C_BTJN: input and output projections of each sub-head.
        D_JM: skip weights, or None for no skip.
        initial_state_BJMN: S_0, zero where None. Belongs to the document of the row's first token.
        seq_idx_BT: integer document ids; the state is zeroed wherever the id changes.
        chunk_size: tokens whose states the reference has in memory together; changes its speed and memory, not the
            result. The kernels choose their own.
        backend: "auto", "reference" or "triton" (state sizes up to 256, no float64).

    Returns:
        y_BTJM in x's dtype and the state after the last token, [B, J, M, N] in float32 (or float64).

    Raises:
        InvalidOptionError: unknown backend, or chunk_size below 1.
        ValueError: shapes that do not belong together.
    """
    inputs = (x_BTJM, A_JMN, dt_BTJM, B_BTJN, C_BTJN, D_JM, initial_state_BJMN)
    supported = HAS_TRITON and kernels.supports(*inputs)
    chosen = pick_backend("selective_scan", backend, backends_on(x_BTJM.device, supported=supported))
    check_chunk_size("selective_scan", chunk_size)
    batch, tokens, heads, channels = x_BTJM.shape
    state_size = A_JMN.shape[-1]
    if tokens < 1:
        raise ValueError("selective_scan: needs T >= 1, got T=0")
    check_shape("selective_scan", "dt_BTJM", dt_BTJM, (batch, tokens, heads, channels))
    check_shape("selective_scan", "A_JMN", A_JMN, (heads, channels, state_size))
    check_shape("selective_scan", "B_BTJN", B_BTJN, (batch, tokens, heads, state_size))
    check_shape("selective_scan", "C_BTJN", C_BTJN, (batch, tokens, heads, state_size))
    check_shape("selective_scan", "D_JM", D_JM, (heads, channels))
    check_shape("selective_scan", "initial_state_BJMN", initial_state_BJMN, (batch, heads, channels, state_size))
    check_shape("selective_scan", "seq_idx_BT", seq_idx_BT, (batch, tokens))
    run = kernels.selective_scan if chosen == "triton" else reference.selective_scan
    return run(x_BTJM, dt_BTJM, A_JMN, B_BTJN, C_BTJN, D_JM, initial_state_BJMN, seq_idx_BT, min(chunk_size, tokens))


def selective_scan_step(
    x_BJM: Tensor,
    dt_BJM: Tensor,
    A_JMN: Tensor,
    B_BJN: Tensor,
    C_BJN: Tensor,
    D_JM: Tensor | None,
    state_BJMN: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of :func:`selective_scan`: returns y_BJM in x's dtype and a new state in the state's dtype.

    Raises InvalidOptionError (unknown backend) or ValueError (shapes).
    """
    pick_backend("selective_scan_step", backend, ("reference",))
    batch, heads, channels = x_BJM.shape
    state_size = A_JMN.shape[-1]
    check_shape("selective_scan_step", "dt_BJM", dt_BJM, (batch, heads, channels))
    check_shape("selective_scan_step", "A_JMN", A_JMN, (heads, channels, state_size))
    check_shape("selective_scan_step", "B_BJN", B_BJN, (batch, heads, state_size))
    check_shape("selective_scan_step", "C_BJN", C_BJN, (batch, heads, state_size))
    check_shape("selective_scan_step", "D_JM", D_JM, (heads, channels))
    check_shape("selective_scan_step", "state_BJMN", state_BJMN, (batch, heads, channels, state_size))
    return reference.selective_scan_step(x_BJM, dt_BJM, A_JMN, B_BJN, C_BJN, D_JM, state_BJMN)
