"""The short depthwise causal convolution that Mamba runs over its inputs before the scan.

Letters: B batch, T tokens, C channels, K width of the convolution, L = K − 1 inputs carried to the next call.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.causal_conv import reference

if HAS_TRITON:
    from mambify.ops.causal_conv import triton as kernels

__all__ = ["causal_conv", "causal_conv_step"]

Activation = Literal["silu"] | None


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    activation: Activation = "silu",
    initial_state_BCL: Tensor | None = None,
    seq_idx_BT: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolves every channel with its own K taps, over this token and the K − 1 before it.

        y_t = act( bias + Σ_k weight_k x_{t−(K−1)+k} )

    Taps that reach into an earlier document give zero.

    Args:
        x_BTC: inputs. Sets the dtype of ``y`` and of the returned state; sums are kept in float32.
        weight_CK: taps, oldest first, as in ``nn.Conv1d(C, C, K, groups=C).weight[:, 0]``.
        bias_C: bias, or None.
        activation: "silu" or None.
        initial_state_BCL: the L inputs before the first token, oldest first; zeros where None. They belong to
            the document of the row's first token.
        seq_idx_BT: integer document ids; a document ends wherever the id changes.
        backend: "auto", "reference" or "triton" (widths 2 to 8, no float64).

    Returns:
        y_BTC, and the last L inputs [B, C, L] for the next call, zero where they belong to an earlier
        document than the last token.

    Raises:
        InvalidOptionError: unknown backend or activation.
        ValueError: shapes that do not belong together.
    """
    inputs = (x_BTC, weight_CK, bias_C, initial_state_BCL)
    supported = HAS_TRITON and kernels.supports(*inputs)
    chosen = pick_backend("causal_conv", backend, backends_on(x_BTC.device, supported=supported))
    _check_activation("causal_conv", activation)
    batch, tokens, channels = x_BTC.shape
    width = weight_CK.shape[1]
    if tokens < 1 or width < 1:
        raise ValueError(f"causal_conv: needs T >= 1 and K >= 1, got T={tokens}, K={width}")
    check_shape("causal_conv", "weight_CK", weight_CK, (channels, width))
    check_shape("causal_conv", "bias_C", bias_C, (channels,))
    check_shape("causal_conv", "initial_state_BCL", initial_state_BCL, (batch, channels, width - 1))
    check_shape("causal_conv", "seq_idx_BT", seq_idx_BT, (batch, tokens))
    run = kernels.causal_conv if chosen == "triton" else reference.causal_conv
    return run(x_BTC, weight_CK, bias_C, activation == "silu", initial_state_BCL, seq_idx_BT)


def causal_conv_step(
    x_BC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    state_BCL: Tensor,
    activation: Activation = "silu",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of :func:`causal_conv`: returns y_BC in x's dtype and a new state in the state's dtype.

    Raises InvalidOptionError (unknown backend or activation) or ValueError (shapes).
    """
    pick_backend("causal_conv_step", backend, ("reference",))
    _check_activation("causal_conv_step", activation)
    batch, channels = x_BC.shape
    width = weight_CK.shape[1]
    check_shape("causal_conv_step", "weight_CK", weight_CK, (channels, width))
    check_shape("causal_conv_step", "bias_C", bias_C, (channels,))
    check_shape("causal_conv_step", "state_BCL", state_BCL, (batch, channels, width - 1))
    return reference.causal_conv_step(x_BC, weight_CK, bias_C, state_BCL, activation == "silu")


def _check_activation(operation: str, activation: str | None) -> None:
    if activation not in ("silu", None):
        raise InvalidOptionError(f"{operation}: no activation '{activation}'; known: 'silu', None")
