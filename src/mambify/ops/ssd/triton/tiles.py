"""What the kernels of the scan share: loads of tiles, and the decays inside a chunk.

Letters: Q tokens a chunk; in kernels t and s are tokens of one chunk, s ≤ t, and r a query head of a key/value head.

Matrix products. On Hopper a product of at least 64 rows in a program of four warps becomes wgmma, whose right operand
is read from shared memory and whose left one may be read from registers. The assembler that Triton brings up to 3.7
(ptxas 12.8, 12.9) sometimes gives those registers to something else before they have been read. So a left operand here
is always a tile as it was loaded, which Triton leaves in shared memory, and a tile that was computed is always a right
operand: outputs are made transposed, channels as rows and tokens as columns.

Decays come from one running sum a chunk, c_t = log2(e) · Σ_{r≤t} A Δ_r. Where it is float64, a difference of two is
taken on (high, low) pairs of float32: right to float32 even after a token that forgets everything.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, row_stride, rows, columns, num_rows, COLUMNS: tl.constexpr, RAGGED: tl.constexpr):
    """Rows of a matrix whose columns are adjacent; where RAGGED, zero beyond ``num_rows`` and COLUMNS."""
    there = pointer + rows[:, None] * row_stride + columns[None, :]
    if RAGGED:
        return tl.load(there, mask=(rows < num_rows)[:, None] & (columns < COLUMNS)[None, :], other=0.0)
    return tl.load(there)


@triton.jit
def store_transposed(pointer, row_stride, rows, columns, num_rows, tile, COLUMNS: tl.constexpr, RAGGED: tl.constexpr):
    """Stores ``tile`` [columns, rows] as :func:`load_tile` would load it."""
    there = pointer + rows[:, None] * row_stride + columns[None, :]
    tile = tl.trans(tile.to(pointer.dtype.element_ty))
    if RAGGED:
        tl.store(there, tile, mask=(rows < num_rows)[:, None] & (columns < COLUMNS)[None, :])
    else:
        tl.store(there, tile)


@triton.jit
def load_state(pointer, p, n, P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr):
    """A block [p, n] of one head's state."""
    there = pointer + p[:, None] * N + n[None, :]
    if RAGGED:
        return tl.load(there, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
    return tl.load(there)


@triton.jit
def store_state(pointer, p, n, state, P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr):
    """The counterpart of :func:`load_state`."""
    there = pointer + p[:, None] * N + n[None, :]
    state = state.to(pointer.dtype.element_ty)
    if RAGGED:
        tl.store(there, state, mask=(p < P)[:, None] & (n < N)[None, :])
    else:
        tl.store(there, state)


@triton.jit
def pair_decay(sums, token, EARLIER_FIRST: tl.constexpr):
    """Decay from token s to token t, 0 where t comes before s; [s, t] where EARLIER_FIRST, else [t, s]."""
    high = sums.to(tl.float32)
    low = (sums - high).to(tl.float32)
    if EARLIER_FIRST:
        exponent = high[None, :] - high[:, None]
        if sums.dtype == tl.float64:
            exponent += low[None, :] - low[:, None]
        kept = token[None, :] >= token[:, None]
    else:
        exponent = high[:, None] - high[None, :]
        if sums.dtype == tl.float64:
            exponent += low[:, None] - low[None, :]
        kept = token[:, None] >= token[None, :]
    return tl.exp2(tl.where(kept, exponent, float("-inf")))
