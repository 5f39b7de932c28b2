"""The kernels that go through a chunk or the chunks in order: the decays' running sums, and the state passes.

With S the state [P, N] that enters a chunk and c the running sum of A Δ inside it,

    forward:  S ← e^{c_Q} S  + Σ_s e^{c_Q−c_s} Δ_s x_s B_sᵀ       each chunk's entering S is stored
    reverse: dS ← e^{c_Q} dS + Σ_t e^{c_t} dy_t C_tᵀ              the gradient of each chunk's leaving S is stored

so one kernel serves both. A program keeps one block of one head's state in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambify.ops.ssd.triton.tiles import load_state, load_tile, store_state


@triton.jit(do_not_specialize=["tokens"])
def decay_kernel(
    dt_ptr, A_ptr, seq_ptr, steps_ptr, sums_ptr, tokens,
    dt_stride_B, seq_stride_B, dt_stride_T, dt_stride_H, seq_stride_T,
    H: tl.constexpr, FORGET: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Δ and the running sums of log2(e) A Δ inside each chunk, both [B, H, c, Q]; Δ = 0 after the last token.

    FORGET is an exponent of 2 whose power is 0 in float32. A smaller one makes no difference, and a document that
    begins forgets as much: no other kernel has to know of documents.
    """
    token = tl.program_id(0) * Q + tl.arange(0, Q)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    batch = tl.program_id(2).to(tl.int64)
    inside = (token < tokens)[None, :] & (head < H)[:, None]
    there = head.to(tl.int64)[:, None] * dt_stride_H + token.to(tl.int64)[None, :] * dt_stride_T
    dt = tl.load(dt_ptr + batch * dt_stride_B + there, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A_ptr + head, mask=head < H, other=0.0) * 1.4426950408889634
    exponent = tl.maximum(rate[:, None] * dt, FORGET)
    if seq_ptr is not None:
        later = (token < tokens) & (token > 0)
        place = seq_ptr + batch * seq_stride_B + token.to(tl.int64) * seq_stride_T
        document = tl.load(place, mask=later, other=0)
        before = tl.load(place - seq_stride_T, mask=later, other=0)
        exponent = tl.where((document != before)[None, :], FORGET, exponent)
    sums = tl.cumsum(exponent.to(tl.float64), axis=1)
    place = (batch * H + head)[:, None] * (tl.num_programs(0) * Q) + token[None, :]
    tl.store(steps_ptr + place, dt, mask=(head < H)[:, None])
    tl.store(sums_ptr + place, sums.to(sums_ptr.dtype.element_ty), mask=(head < H)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def state_kernel(
    left_ptr, right_ptr, steps_ptr, sums_ptr, first_ptr, states_ptr, last_ptr, tokens, left_stride_B, right_stride_B,
    left_stride_T: tl.constexpr, left_stride_G: tl.constexpr,
    right_stride_T: tl.constexpr, right_stride_G: tl.constexpr,
    H: tl.constexpr, LEFT_SHARE: tl.constexpr, RIGHT_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One state pass. Left is x or dy, right is B or C; so many heads of the H share one left, and one right.

    ``first_ptr`` is the state to begin with (None: zero), ``last_ptr`` takes the one it ends with (None: not kept).
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = BLOCKS_N * ((P + BLOCK_P - 1) // BLOCK_P)
    block = tl.program_id(0) % BLOCKS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)  # batch · H + head
    head, batch = row % H, row // H
    p = (block // BLOCKS_N) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (block % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, Q)
    chunks = tl.cdiv(tokens, Q)
    left_ptr += batch * left_stride_B + head // LEFT_SHARE * left_stride_G
    right_ptr += batch * right_stride_B + head // RIGHT_SHARE * right_stride_G
    steps_ptr += row * chunks * Q
    sums_ptr += row * chunks * Q
    states_ptr += (batch * chunks * H + head) * (P * N)

    origin = tl.full([], 0, tl.int64)  # offsets of long rows do not fit 32 bits
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if first_ptr is not None:
        state = load_state(first_ptr + row * (P * N), p, n, P, N, RAGGED)
    for step in tl.range(chunks, num_stages=STAGES):
        chunk = origin + (chunks - 1 - step if REVERSE else step)
        store_state(states_ptr + chunk * (H * P * N), p, n, state, P, N, RAGGED)
        start = chunk * Q
        here = tl.minimum(tokens - start, Q).to(tl.int32)
        sums = tl.load(sums_ptr + start + t)
        whole = tl.load(sums_ptr + start + Q - 1)
        if REVERSE:
            weight = tl.exp2(sums.to(tl.float32))
        else:
            weight = tl.load(steps_ptr + start + t) * tl.exp2((whole - sums).to(tl.float32))
        left = load_tile(left_ptr + start * left_stride_T, left_stride_T, t, p, here, P, RAGGED)
        right = load_tile(right_ptr + start * right_stride_T, right_stride_T, t, n, here, N, RAGGED)
        right = (right * weight[:, None]).to(left.dtype)
        state *= tl.exp2(whole.to(tl.float32))
        state = tl.dot(tl.trans(left), right, state, input_precision="ieee")
    if last_ptr is not None:
        store_state(last_ptr + row * (P * N), p, n, state, P, N, RAGGED)
