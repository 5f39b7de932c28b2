"""Mamba2's state-space scan with grouped heads.

Letters: B batch, T tokens, H heads of the state, G heads of x, U of B and V of C (each divides H), P head dimension, N
state size. What attention leaves has G = U key/value heads and V = H query heads; stock Mamba2 has G = H and U = V.
"""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_chunk_size, check_shape, pick_backend
from mambify.ops.head_groups import check_head_groups
from mambify.ops.ssd import reference

if HAS_TRITON:
    from mambify.ops.ssd import triton as kernels

__all__ = ["ssd_scan", "ssd_step"]


def ssd_scan(
    x_BTGP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTUN: Tensor,
    C_BTVN: Tensor,
    D_H: Tensor | None = None,
    *,
    initial_state_BHPN: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs Mamba2's recurrence over T tokens at once (state-space duality, arXiv 2405.21060, section 6).

        S_t = exp(A Δ_t) S_{t-1} + Δ_t x_t B_tᵀ        y_t = S_t C_t + D x_t

    Head h reads head h // (H // G) of ``x``, and likewise of ``B`` and ``C``. The kernels repeat none of them, unless
    gradients are wanted of another grouping than G = U, V = H.

    Args:
        x_BTGP: values. Sets the dtype of ``y``; large matrix products run in the widest dtype of x, B and C.
        dt_BTH: step sizes Δ ≥ 0, after softplus.
        A_H: decay rates, A ≤ 0.
        B_BTUN, C_BTVN: input and output projections (keys and queries of the attention it came from).
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
    supported = HAS_TRITON and kernels.supports(x_BTGP, dt_BTH, B_BTUN, C_BTVN, initial_state_BHPN)
    chosen = pick_backend("ssd_scan", backend, backends_on(x_BTGP.device, supported=supported))
    check_chunk_size("ssd_scan", chunk_size)
    batch, tokens, groups, head_dim = x_BTGP.shape
    heads, state_size = len(A_H), C_BTVN.shape[-1]
    if tokens < 1:
        raise ValueError("ssd_scan: needs T >= 1, got T=0")
    check_shape("ssd_scan", "dt_BTH", dt_BTH, (batch, tokens, heads))
    check_head_groups("ssd_scan", heads, G=groups, U=B_BTUN.shape[2], V=C_BTVN.shape[2])
    check_shape("ssd_scan", "B_BTUN", B_BTUN, (batch, tokens, B_BTUN.shape[2], state_size))
    check_shape("ssd_scan", "C_BTVN", C_BTVN, (batch, tokens, C_BTVN.shape[2], state_size))
    check_shape("ssd_scan", "D_H", D_H, (heads,))
    check_shape("ssd_scan", "initial_state_BHPN", initial_state_BHPN, (batch, heads, head_dim, state_size))
    check_shape("ssd_scan", "seq_idx_BT", seq_idx_BT, (batch, tokens))
    if chosen == "triton":
        return kernels.ssd_scan(x_BTGP, dt_BTH, A_H, B_BTUN, C_BTVN, D_H, initial_state_BHPN, seq_idx_BT)
    return reference.ssd_scan(
        x_BTGP, dt_BTH, A_H, B_BTUN, C_BTVN, D_H, initial_state_BHPN, seq_idx_BT, min(chunk_size, tokens)
    )


def ssd_step(
    x_BGP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BUN: Tensor,
    C_BVN: Tensor,
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
    heads, state_size = len(A_H), C_BVN.shape[-1]
    check_shape("ssd_step", "dt_BH", dt_BH, (batch, heads))
    check_head_groups("ssd_step", heads, G=groups, U=B_BUN.shape[1], V=C_BVN.shape[1])
    check_shape("ssd_step", "B_BUN", B_BUN, (batch, B_BUN.shape[1], state_size))
    check_shape("ssd_step", "C_BVN", C_BVN, (batch, C_BVN.shape[1], state_size))
    check_shape("ssd_step", "D_H", D_H, (heads,))
    check_shape("ssd_step", "state_BHPN", state_BHPN, (batch, heads, head_dim, state_size))
    return reference.ssd_step(x_BGP, dt_BH, A_H, B_BUN, C_BVN, D_H, state_BHPN)
