"""The kernels of the gradients, after the reverse state pass.

With S the state that enters a chunk, dS the gradient of the one that leaves it, c_Q the chunk's whole sum, and
L_ts = e^{c_t−c_s} for s ≤ t, else 0:

    dC_t = e^{c_t} Sᵀ dy_t         + Σ_s L_ts Δ_s (dy_t·x_s) B_s
    dx_s = Δ_s e^{c_Q−c_s} dS B_s  + Σ_t L_ts Δ_s (C_t·B_s) dy_t + D dy_s      } summed over the R query heads
    dB_s = Δ_s e^{c_Q−c_s} dSᵀ x_s + Σ_t L_ts Δ_s (dy_t·x_s) C_t               } of a key/value head
    dΔ_s = direct_s + leave_s + A da_s,      dA = Σ_s Δ_s da_s,      dD = Σ_s diagonal_s

with   direct_s = Σ_t L_ts (dy_t·x_s) (C_t·B_s),    diagonal_s = dy_s·x_s,
       leave_s = e^{c_Q−c_s} x_s·dS B_s,    enter_t = e^{c_t} dy_t·S C_t,    whole = e^{c_Q} <S, dS>,
       da_r = Σ_{s<r≤t} Δ_s L_ts (dy_t·x_s) (C_t·B_s) + Σ_{s<r} Δ_s leave_s + Σ_{t≥r} enter_t + whole.

da_r, the gradient of A Δ_r, is the sum of what passes token r and nothing else. It is also the sum over t ≥ r of
C_t·dC_t − B_t·dB_t, which is cheaper; but there large terms have to cancel, and A multiplies what rounding leaves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambify.ops.ssd.triton.tiles import load_state, load_tile, pair_decay, store_transposed


@triton.jit(do_not_specialize=["tokens"])
def gradient_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, sums_ptr, states_ptr, dy_ptr, dstates_ptr, dx_ptr, dB_ptr, dC_ptr,
    inner_ptr, direct_ptr, leave_ptr, enter_ptr, diagonal_ptr, tokens, x_stride_B, B_stride_B, C_stride_B, dy_stride_B,
    x_stride_T: tl.constexpr, x_stride_G: tl.constexpr, B_stride_T: tl.constexpr, B_stride_G: tl.constexpr,
    C_stride_T: tl.constexpr, C_stride_H: tl.constexpr, dy_stride_T: tl.constexpr, dy_stride_H: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, INNER_P: tl.constexpr, INNER_N: tl.constexpr,
):  # fmt: skip
    """A program makes one block of channels of dx, dB or dC of one chunk; one whose pointer is None is not wanted.

    The programs of a chunk are neighbours, so that they find each other's tiles in the L2 cache. Sums over P and N are
    made INNER_P and INNER_N at a time. dx leaves ``leave`` behind and dC the other vectors: [blocks, B, H, c, Q].
    """
    G: tl.constexpr = H // R
    BLOCKS_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    X_SLOTS: tl.constexpr = 0 if dx_ptr is None else BLOCKS_P
    B_SLOTS: tl.constexpr = 0 if dB_ptr is None else BLOCKS_N
    SLOTS: tl.constexpr = X_SLOTS + B_SLOTS + (0 if dC_ptr is None else R * BLOCKS_N)
    chunks = tl.cdiv(tokens, Q)
    slot = tl.program_id(0) % SLOTS
    place = (tl.program_id(0) // SLOTS).to(tl.int64)  # (batch · c + chunk) · G + group
    group, chunk, batch = place % G, place // G % chunks, place // G // chunks
    start = chunk * Q
    here = tl.minimum(tokens - start, Q).to(tl.int32)
    x_ptr += batch * x_stride_B + group * x_stride_G + start * x_stride_T
    B_ptr += batch * B_stride_B + group * B_stride_G + start * B_stride_T
    C_ptr += batch * C_stride_B + group * (R * C_stride_H) + start * C_stride_T
    dy_ptr += batch * dy_stride_B + group * (R * dy_stride_H) + start * dy_stride_T
    row = chunks * Q  # of one head's vector
    vector = (batch * H + group * R) * row + start  # of the first head
    part = (tl.num_programs(0) // SLOTS).to(tl.int64) * (R * Q)  # B · H · c · Q
    steps_ptr += vector
    sums_ptr += vector
    states_ptr += place * (R * P * N)
    dstates_ptr += place * (R * P * N)
    if slot < X_SLOTS:
        if dx_ptr is not None:
            _dx(
                x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, sums_ptr, dy_ptr, dstates_ptr,
                dx_ptr + ((batch * tokens + start) * G + group) * P, leave_ptr + slot * part + vector,
                group * R, slot * BLOCK_P, here, row, x_stride_T, B_stride_T, C_stride_T, C_stride_H, dy_stride_T,
                dy_stride_H, G, R, P, N, RAGGED, Q, BLOCK_P, INNER_N,
            )  # fmt: skip
    elif slot < X_SLOTS + B_SLOTS:
        if dB_ptr is not None:
            _dB(
                x_ptr, C_ptr, steps_ptr, sums_ptr, dy_ptr, dstates_ptr,
                dB_ptr + ((batch * tokens + start) * G + group) * N,
                (slot - X_SLOTS) * BLOCK_N, here, row, x_stride_T, C_stride_T, C_stride_H, dy_stride_T,
                dy_stride_H, G, R, P, N, RAGGED, Q, BLOCK_N, INNER_P,
            )  # fmt: skip
    else:
        if dC_ptr is not None:
            block = (slot - X_SLOTS - B_SLOTS) % BLOCKS_N
            r = (slot - X_SLOTS - B_SLOTS) // BLOCKS_N
            vector += block * part + r * row
            _dC(
                x_ptr, B_ptr, C_ptr + r * C_stride_H, steps_ptr + r * row, sums_ptr + r * row,
                states_ptr + r * (P * N), dy_ptr + r * dy_stride_H, dstates_ptr + r * (P * N),
                dC_ptr + ((batch * tokens + start) * H + group * R + r) * N,
                inner_ptr + vector, direct_ptr + vector, enter_ptr + vector, diagonal_ptr + vector,
                block, here, x_stride_T, B_stride_T, C_stride_T, dy_stride_T, H, P, N, RAGGED, Q, BLOCK_N, INNER_P,
            )  # fmt: skip


@triton.jit
def _dx(
    x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, sums_ptr, dy_ptr, dstates_ptr, dx_ptr, leave_ptr,
    first_head, first_p, here, row,
    x_stride_T: tl.constexpr, B_stride_T: tl.constexpr, C_stride_T: tl.constexpr, C_stride_H: tl.constexpr,
    dy_stride_T: tl.constexpr, dy_stride_H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, RAGGED: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, INNER_N: tl.constexpr,
):  # fmt: skip
    """A block of dx, and its share of ``leave``, which is a sum over P."""
    p, n, s = first_p + tl.arange(0, BLOCK_P), tl.arange(0, INNER_N), tl.arange(0, Q)
    if INNER_N >= N:
        B = load_tile(B_ptr, B_stride_T, s, n, here, N, RAGGED)
    dx = tl.zeros([BLOCK_P, Q], tl.float32)  # [p, s]
    for r in tl.range(R, disable_licm=True):
        dt = tl.load(steps_ptr + r * row + s)
        sums = tl.load(sums_ptr + r * row + s)
        leave = tl.exp2((tl.load(sums_ptr + r * row + Q - 1) - sums).to(tl.float32))
        dy = load_tile(dy_ptr + r * dy_stride_H, dy_stride_T, s, p, here, P, RAGGED)
        if INNER_N >= N:
            dstate = load_state(dstates_ptr + r * (P * N), p, n, P, N, RAGGED)
            C = load_tile(C_ptr + r * C_stride_H, C_stride_T, s, n, here, N, RAGGED)
        left = tl.zeros([BLOCK_P, Q], tl.float32)  # [p, s]
        for first_n in tl.static_range(0, N, INNER_N):
            if INNER_N < N:
                n = first_n + tl.arange(0, INNER_N)
                B = load_tile(B_ptr, B_stride_T, s, n, here, N, RAGGED)
                dstate = load_state(dstates_ptr + r * (P * N), p, n, P, N, RAGGED)
            left = tl.dot(dstate, tl.trans(B), left, input_precision="ieee")
        x = load_tile(x_ptr, x_stride_T, s, p, here, P, RAGGED)  # again and again: to keep it costs more registers
        tl.store(leave_ptr + r * row + s, leave * tl.sum(tl.trans(left) * x.to(tl.float32), axis=1))
        dx += left * (leave * dt)[None, :]
        mix = tl.zeros([Q, Q], tl.float32)  # [t, s]
        for first_n in tl.static_range(0, N, INNER_N):
            if INNER_N < N:
                n = first_n + tl.arange(0, INNER_N)
                B = load_tile(B_ptr, B_stride_T, s, n, here, N, RAGGED)
                C = load_tile(C_ptr + r * C_stride_H, C_stride_T, s, n, here, N, RAGGED)
            mix = tl.dot(C, tl.trans(B), mix, input_precision="ieee")
        mix *= pair_decay(sums, s, EARLIER_FIRST=False) * dt[None, :]
        if D_ptr is not None:
            mix += tl.where(s[:, None] == s[None, :], tl.load(D_ptr + first_head + r), 0.0)
        dx = tl.dot(tl.trans(dy), mix.to(dy.dtype), dx, input_precision="ieee")
    store_transposed(dx_ptr, G * P, s, p, here, dx, P, RAGGED)


@triton.jit
def _dB(
    x_ptr, C_ptr, steps_ptr, sums_ptr, dy_ptr, dstates_ptr, dB_ptr, first_n, here, row,
    x_stride_T: tl.constexpr, C_stride_T: tl.constexpr, C_stride_H: tl.constexpr, dy_stride_T: tl.constexpr,
    dy_stride_H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    RAGGED: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, INNER_P: tl.constexpr,
):  # fmt: skip
    """A block of dB."""
    p, n, s = tl.arange(0, INNER_P), first_n + tl.arange(0, BLOCK_N), tl.arange(0, Q)
    if INNER_P >= P:
        x = load_tile(x_ptr, x_stride_T, s, p, here, P, RAGGED)
    dB = tl.zeros([BLOCK_N, Q], tl.float32)  # [n, s]
    for r in tl.range(R, disable_licm=True):
        dt = tl.load(steps_ptr + r * row + s)
        sums = tl.load(sums_ptr + r * row + s)
        leave = tl.exp2((tl.load(sums_ptr + r * row + Q - 1) - sums).to(tl.float32))
        C = load_tile(C_ptr + r * C_stride_H, C_stride_T, s, n, here, N, RAGGED)
        if INNER_P >= P:
            dstate = load_state(dstates_ptr + r * (P * N), p, n, P, N, RAGGED)
            dy = load_tile(dy_ptr + r * dy_stride_H, dy_stride_T, s, p, here, P, RAGGED)
        left = tl.zeros([BLOCK_N, Q], tl.float32)  # [n, s]
        for first_p in tl.static_range(0, P, INNER_P):
            if INNER_P < P:
                p = first_p + tl.arange(0, INNER_P)
                x = load_tile(x_ptr, x_stride_T, s, p, here, P, RAGGED)
                dstate = load_state(dstates_ptr + r * (P * N), p, n, P, N, RAGGED)
            left = tl.dot(tl.trans(dstate), tl.trans(x), left, input_precision="ieee")
        dB += left * (leave * dt)[None, :]
        dscore = tl.zeros([Q, Q], tl.float32)  # [t, s]
        for first_p in tl.static_range(0, P, INNER_P):
            if INNER_P < P:
                p = first_p + tl.arange(0, INNER_P)
                x = load_tile(x_ptr, x_stride_T, s, p, here, P, RAGGED)
                dy = load_tile(dy_ptr + r * dy_stride_H, dy_stride_T, s, p, here, P, RAGGED)
            dscore = tl.dot(dy, tl.trans(x), dscore, input_precision="ieee")
        dscore *= pair_decay(sums, s, EARLIER_FIRST=False) * dt[None, :]
        dB = tl.dot(tl.trans(C), dscore.to(C.dtype), dB, input_precision="ieee")
    store_transposed(dB_ptr, G * N, s, n, here, dB, N, RAGGED)


@triton.jit
def _dC(
    x_ptr, B_ptr, C_ptr, steps_ptr, sums_ptr, states_ptr, dy_ptr, dstates_ptr, dC_ptr,
    inner_ptr, direct_ptr, enter_ptr, diagonal_ptr, block, here,
    x_stride_T: tl.constexpr, B_stride_T: tl.constexpr, C_stride_T: tl.constexpr, dy_stride_T: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, INNER_P: tl.constexpr,
):  # fmt: skip
    """A block of dC, and its shares of the decays' gradients, which are sums over N; ``whole`` joins the last token."""
    n, t = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, Q)
    dt = tl.load(steps_ptr + t)
    sums = tl.load(sums_ptr + t)
    dC = tl.zeros([BLOCK_N, Q], tl.float32)  # [n, t]
    dscore = tl.zeros([Q, Q], tl.float32)  # [s, t]
    C = load_tile(C_ptr, C_stride_T, t, n, here, N, RAGGED)
    B = load_tile(B_ptr, B_stride_T, t, n, here, N, RAGGED)
    whole = 0.0
    for first_p in tl.static_range(0, P, INNER_P):
        p = first_p + tl.arange(0, INNER_P)
        state = load_state(states_ptr, p, n, P, N, RAGGED)
        dstate = load_state(dstates_ptr, p, n, P, N, RAGGED)
        dy = load_tile(dy_ptr, dy_stride_T, t, p, here, P, RAGGED)
        x = load_tile(x_ptr, x_stride_T, t, p, here, P, RAGGED)
        whole += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        dC = tl.dot(tl.trans(state), tl.trans(dy), dC, input_precision="ieee")
        dscore = tl.dot(x, tl.trans(dy), dscore, input_precision="ieee")
    whole *= tl.exp2(tl.load(sums_ptr + Q - 1).to(tl.float32))
    dC *= tl.exp2(sums.to(tl.float32))[None, :]
    enter = tl.sum(tl.trans(dC) * C.to(tl.float32), axis=1)
    tl.store(enter_ptr + t, tl.where(t == Q - 1, enter + whole, enter))

    dscore *= pair_decay(sums, t, EARLIER_FIRST=True)
    diagonal = tl.sum(tl.where(t[:, None] == t[None, :], dscore, 0.0), axis=1)
    tl.store(diagonal_ptr + t, tl.where(block == 0, diagonal, 0.0))
    pairs = tl.dot(B, tl.trans(C), input_precision="ieee") * dscore
    tl.store(direct_ptr + t, tl.sum(pairs, axis=1))
    pairs = (pairs * dt[:, None]).to(B.dtype)
    for first in tl.static_range(0, Q, 32):  # 32 rows are too few for wgmma: its left operand would be in registers
        r = first + tl.arange(0, 32)
        earlier = (t[None, :] < r[:, None]).to(B.dtype)  # [r, s]
        passing = tl.dot(earlier, pairs, input_precision="ieee")  # [r, t]
        tl.store(inner_ptr + r, tl.sum(tl.where(t[None, :] >= r[:, None], passing, 0.0), axis=1))

    dscore *= dt[:, None]
    dC = tl.dot(tl.trans(B), dscore.to(B.dtype), dC, input_precision="ieee")
    store_transposed(dC_ptr, H * N, t, n, here, dC, N, RAGGED)


@triton.jit(do_not_specialize=["tokens"])
def decay_gradient_kernel(
    A_ptr, steps_ptr, inner_ptr, direct_ptr, leave_ptr, enter_ptr, diagonal_ptr, ddt_ptr, shares_ptr, tokens,
    H: tl.constexpr, BLOCKS_P: tl.constexpr, BLOCKS_N: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dΔ of one chunk, and the chunk's shares of dA and dD: [2, B · c, H]."""
    chunk, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    chunks, batches = tl.num_programs(0), tl.num_programs(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.arange(0, Q)
    known = (head < H)[:, None] & (r >= 0)[None, :]
    vector = ((batch * H + head)[:, None] * chunks + chunk) * Q + r[None, :]
    part = batches.to(tl.int64) * H * chunks * Q
    dt = tl.load(steps_ptr + vector, mask=known, other=0.0)
    da = tl.zeros([BLOCK_H, Q], tl.float32)
    direct = tl.zeros([BLOCK_H, Q], tl.float32)
    left = tl.zeros([BLOCK_H, Q], tl.float32)  # of the token before
    enter = tl.zeros([BLOCK_H, Q], tl.float32)
    diagonal = tl.zeros([BLOCK_H, Q], tl.float32)
    for block in tl.static_range(BLOCKS_P):
        direct += tl.load(leave_ptr + block * part + vector, mask=known, other=0.0)
        left += tl.load(leave_ptr + block * part + vector - 1, mask=known & (r > 0)[None, :], other=0.0)
    for block in tl.static_range(BLOCKS_N):
        da += tl.load(inner_ptr + block * part + vector, mask=known, other=0.0)
        direct += tl.load(direct_ptr + block * part + vector, mask=known, other=0.0)
        enter += tl.load(enter_ptr + block * part + vector, mask=known, other=0.0)
        diagonal += tl.load(diagonal_ptr + block * part + vector, mask=known, other=0.0)
    left *= tl.load(steps_ptr + vector - 1, mask=known & (r > 0)[None, :], other=0.0)
    da += tl.cumsum(left, axis=1) + tl.cumsum(enter, axis=1, reverse=True)
    A = tl.load(A_ptr + head, mask=head < H, other=0.0)
    token = chunk * Q + r
    there = (batch * tokens + token)[None, :] * H + head[:, None]
    tl.store(ddt_ptr + there, direct + A[:, None] * da, mask=known & (token < tokens)[None, :])
    share = (batch * chunks + chunk) * H + head
    tl.store(shares_ptr + share, tl.sum(dt * da, axis=1), mask=head < H)
    tl.store(shares_ptr + batches.to(tl.int64) * chunks * H + share, tl.sum(diagonal, axis=1), mask=head < H)
