"""The kernel of the outputs: one block of channels of one chunk of one head a program.

With S the state that enters the chunk and c the running sum of A Δ inside it,

    y_t = e^{c_t} S C_t + Σ_{s≤t} e^{c_t−c_s} Δ_s (B_s·C_t) x_s + D x_t
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambify.ops.ssd.triton.tiles import load_state, load_tile, pair_decay, store_transposed


@triton.jit(do_not_specialize=["tokens"])
def output_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, sums_ptr, states_ptr, y_ptr, tokens, x_stride_B, B_stride_B, C_stride_B,
    x_stride_T: tl.constexpr, x_stride_G: tl.constexpr, B_stride_T: tl.constexpr, B_stride_G: tl.constexpr,
    C_stride_T: tl.constexpr, C_stride_G: tl.constexpr,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, INNER_N: tl.constexpr,
):  # fmt: skip
    """X_SHARE, B_SHARE, C_SHARE heads read the same x, B and C. ``D_ptr`` is None where there is no skip; sums over N
    are made INNER_N at a time."""
    BLOCKS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    chunks = tl.cdiv(tokens, Q)
    block = tl.program_id(0) % BLOCKS
    place = (tl.program_id(0) // BLOCKS).to(tl.int64)  # (batch · c + chunk) · H + head
    head, chunk, batch = place % H, place // H % chunks, place // H // chunks
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    t = tl.arange(0, Q)
    start = chunk * Q
    here = tl.minimum(tokens - start, Q).to(tl.int32)
    x_ptr += batch * x_stride_B + head // X_SHARE * x_stride_G + start * x_stride_T
    B_ptr += batch * B_stride_B + head // B_SHARE * B_stride_G + start * B_stride_T
    C_ptr += batch * C_stride_B + head // C_SHARE * C_stride_G + start * C_stride_T
    vector = ((batch * H + head) * chunks + chunk) * Q + t
    dt = tl.load(steps_ptr + vector)
    sums = tl.load(sums_ptr + vector)
    x = load_tile(x_ptr, x_stride_T, t, p, here, P, RAGGED)
    y = tl.zeros([BLOCK_P, Q], tl.float32)  # [p, t]
    mix = tl.zeros([Q, Q], tl.float32)  # [s, t]
    for first_n in tl.static_range(0, N, INNER_N):
        n = first_n + tl.arange(0, INNER_N)
        C = load_tile(C_ptr, C_stride_T, t, n, here, N, RAGGED)
        state = load_state(states_ptr + place * (P * N), p, n, P, N, RAGGED)
        B = load_tile(B_ptr, B_stride_T, t, n, here, N, RAGGED)
        y = tl.dot(state, tl.trans(C), y, input_precision="ieee")
        mix = tl.dot(B, tl.trans(C), mix, input_precision="ieee")
    y *= tl.exp2(sums.to(tl.float32))[None, :]
    mix *= pair_decay(sums, t, EARLIER_FIRST=True) * dt[:, None]
    if D_ptr is not None:
        mix += tl.where(t[:, None] == t[None, :], tl.load(D_ptr + head), 0.0)
    y = tl.dot(tl.trans(x), mix.to(x.dtype), y, input_precision="ieee")
    y_ptr += ((batch * tokens + start) * H + head) * P
    store_transposed(y_ptr, H * P, t, p, here, y, P, RAGGED)
