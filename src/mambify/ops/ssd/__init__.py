"""Mamba2's state-space scan with grouped key/value heads.

Letters: B batch, T tokens, H query heads, G key/value heads (H = G·R), P head dimension, N state size.
"""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_chunk_size, check_shape, pick_backend
from mambify.ops.ssd import reference

if HAS_TRITON:
    from mambify.ops.ssd import triton as kernels

__all__ = ["ssd_scan", "ssd_step"]


def ssd_scan(
    x_BTGP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTHN: Tensor,
    D_H: Tensor | None = None,
    *,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs Mamba2's recurrence over T tokens at once (state-space duality, arXiv 2405.21060, section 6).

        S_t = exp(A Δ_t) S_{t-1} + Δ_t x_t B_tᵀ        y_t = S_t C_t + D x_t

    Query head h reads key/value head h // (H // G) of ``x`` and ``B``.

    Args:
        x_BTGP: values. Sets the dtype of ``y``; large matrix products run in the widest dtype of x, B and C.
        dt_BTH: step sizes Δ ≥ 0, after softplus.
        A_H: decay rates, A ≤ 0.
        B_BTGN, C_BTHN: input and output projections (keys and queries of the attention it came from).
        D_H: skip weights, or None for no skip.
        initial_state_BHPN: S_0, zero where None. Belongs to the document of the row's first token.
        seq_idx_BT: integer document ids; the state is zeroed wherever the id changes.
        chunk_size: tokens worked on as one matrix; changes speed and memory, not the result. The Triton kernels
            choose their own.
        backend: "auto", "reference" or "triton" (P and N up to 128, no float64).

    Returns:
        y_BTHP in x's dtype and the state after the last token, [B, H, P, N] in float32 (float64 where an
        input is).

    Raises:
        InvalidOptionError: unknown backend, or chunk_size below 1.
        ValueError: shapes that do not belong together.
    """
    supported = HAS_TRITON and kernels.supports(x_BTGP, dt_BTH, B_BTGN, C_BTHN, initial_state_BHPN)
    chosen = pick_backend("ssd_scan", backend, backends_on(x_BTGP.device, supported=supported))
    check_chunk_size("ssd_scan", chunk_size)
    batch, tokens, groups, head_dim = x_BTGP.shape
    heads, state_size = C_BTHN.shape[2:]
    if tokens < 1 or heads % groups:
        raise ValueError(f"ssd_scan: needs T >= 1 and G dividing H, got T={tokens}, G={groups}, H={heads}")
    check_shape("ssd_scan", "dt_BTH", dt_BTH, (batch, tokens, heads))
    check_shape("ssd_scan", "A_H", A_H, (heads,))
    check_shape("ssd_scan", "B_BTGN", B_BTGN, (batch, tokens, groups, state_size))
    check_shape("ssd_scan", "C_BTHN", C_BTHN, (batch, tokens, heads, state_size))
    check_shape("ssd_scan", "D_H", D_H, (heads,))
    check_shape("ssd_scan", "initial_state_BHPN", initial_state_BHPN, (batch, heads, head_dim, state_size))
    check_shape("ssd_scan", "seq_idx_BT", seq_idx_BT, (batch, tokens))
    if chosen == "triton":
        return kernels.ssd_scan(x_BTGP, dt_BTH, A_H, B_BTGN, C_BTHN, D_H, initial_state_BHPN, seq_idx_BT)
    return reference.ssd_scan(
        x_BTGP, dt_BTH, A_H, B_BTGN, C_BTHN, D_H, initial_state_BHPN, seq_idx_BT, min(chunk_size, tokens)
    )


def ssd_step(
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BHN: Tensor,
    D_H: Tensor | None,
    state_BHPN: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of :func:`ssd_scan`: returns y_BHP in x's dtype and a new state in the state's dtype.

    Raises InvalidOptionError (unknown backend) or ValueError (shapes).
    """
    pick_backend("ssd_step", backend, ("reference",))
    batch, groups, head_dim = x_BGP.shape
    heads, state_size = C_BHN.shape[1:]
    if heads % groups:
        raise ValueError(f"ssd_step: needs G dividing H, got G={groups}, H={heads}")
    check_shape("ssd_step", "dt_BH", dt_BH, (batch, heads))
    check_shape("ssd_step", "A_H", A_H, (heads,))
    check_shape("ssd_step", "B_BGN", B_BGN, (batch, groups, state_size))
    check_shape("ssd_step", "C_BHN", C_BHN, (batch, heads, state_size))
    check_shape("ssd_step", "D_H", D_H, (heads,))
    check_shape("ssd_step", "state_BHPN", state_BHPN, (batch, heads, head_dim, state_size))
    return reference.ssd_step(x_BGP, dt_BH, A_H, B_BGN, C_BHN, D_H, state_BHPN)
