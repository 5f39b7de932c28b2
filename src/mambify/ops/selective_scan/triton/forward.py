"""The forward kernels of the selective scan, and what the backward kernels share with them.

A program is one warp with a tile of BLOCK_M channels by BLOCK_N state entries of one sub-head, held in registers. It
goes over the tokens of one segment, UNROLL at a time: their inputs come as tiles [U, M] and [U, N], which are taken
apart into one vector a token, and leave as a tile too, so that loads and stores are wide and those of the next tokens
are under way while these are computed. The exponential is what it waits for: one an entry and token.

Where there are too few sub-heads for the GPU, the sequence is cut into S segments: ``scan_kernel`` without an output
gives each segment's state from zero and its decay, ``combine_kernel`` the state that enters each, and ``scan_kernel``
again the output. At a document's first token the exponent gets −∞ (``cut``), so that nothing is left of the state.

Letters: B batch, T tokens, J sub-heads, M channels a sub-head, N state size, S segments; in kernels M = BLOCK_M
channels, N = BLOCK_N ≥ the state size, U = UNROLL tokens.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scan_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, enter_ptr, seq_ptr, y_ptr, saved_ptr, state_ptr, decay_ptr,
    T, segment, x_batch, x_head, dt_batch, dt_head, B_batch, B_head, C_batch, C_head, seq_batch, seq_t,
    X_TOKEN: tl.constexpr, DT_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr,
    J: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SAVED_EVERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """With ``y_ptr``: the output; the state that enters every SAVED_EVERY tokens to ``saved_ptr`` [B, ·, J, M, N],
    unless None; the state after the last token to ``state_ptr`` [B, J, M, N]. Without: the state after each segment
    that zero enters to ``state_ptr`` and the segment's decay to ``decay_ptr``, both [B, S, J, M, N]."""
    head, number, m, n, mn, here = place(J, M, N, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    segments = tl.cdiv(T, segment)
    start = number * segment
    stop = tl.minimum(start + segment, T)
    rate = tl.load(A_ptr + mn, mask=here, other=0.0).to(tl.float32) * LOG2E
    state = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if enter_ptr is not None:
        state = tl.load(enter_ptr + (batch * segments + number) * (J * M * N) + mn, mask=here, other=0.0)
    skip = tl.zeros((BLOCK_M,), tl.float32)
    if D_ptr is not None:
        skip = tl.load(D_ptr + head * M + m, mask=m < M, other=0.0).to(tl.float32)
    x_ptr += batch * x_batch + head * x_head
    dt_ptr += batch * dt_batch + head * dt_head
    B_ptr += batch * B_batch + head * B_head
    if seq_ptr is not None:
        seq_ptr += batch * seq_batch
    if y_ptr is not None:
        C_ptr += batch * C_batch + head * C_head
        y_ptr += batch * T * (J * M) + head * M
    if saved_ptr is not None:
        saved_ptr += batch * tl.cdiv(T, SAVED_EVERY) * (J * M * N) + mn
    total_dt = tl.zeros((UNROLL, BLOCK_M), tl.float32)
    total_cut = tl.zeros((UNROLL, BLOCK_M), tl.float32)
    x_UM = load_tokens(x_ptr, start, stop, m, M, X_TOKEN, UNROLL)
    dt_UM = load_tokens(dt_ptr, start, stop, m, M, DT_TOKEN, UNROLL)
    B_UN = load_tokens(B_ptr, start, stop, n, N, B_TOKEN, UNROLL)
    C_UN = B_UN if y_ptr is None else load_tokens(C_ptr, start, stop, n, N, C_TOKEN, UNROLL)
    for begin in range(start, stop, UNROLL):
        next_x_UM = load_tokens(x_ptr, begin + UNROLL, stop, m, M, X_TOKEN, UNROLL)
        next_dt_UM = load_tokens(dt_ptr, begin + UNROLL, stop, m, M, DT_TOKEN, UNROLL)
        next_B_UN = load_tokens(B_ptr, begin + UNROLL, stop, n, N, B_TOKEN, UNROLL)
        next_C_UN = next_B_UN if y_ptr is None else load_tokens(C_ptr, begin + UNROLL, stop, n, N, C_TOKEN, UNROLL)
        if saved_ptr is not None:  # noqa: SIM102 (this one is decided at compile time)
            if begin % SAVED_EVERY == 0:
                tl.store(saved_ptr + tl.cast(begin // SAVED_EVERY, tl.int64) * (J * M * N), state, mask=here)
        dt_UM = dt_UM.to(tl.float32)
        x_UM = x_UM.to(tl.float32)
        dts_writes = each_of_two(dt_UM, dt_UM * x_UM, UNROLL)
        cuts = no_cuts(UNROLL)
        if seq_ptr is not None:
            cut_UM = load_cuts(seq_ptr, begin, stop, m, seq_t, UNROLL)
            cuts = each(cut_UM, UNROLL)
        if y_ptr is None:
            total_dt += dt_UM
            if seq_ptr is not None:
                total_cut += cut_UM
            Bs = each(B_UN.to(tl.float32), UNROLL)
            for i in tl.static_range(UNROLL):
                write = dts_writes[2 * i + 1][:, None] * Bs[i][None, :]
                state = decay(dts_writes[2 * i], rate, cuts[i]) * state + write
        else:
            Bs_Cs = each_of_two(B_UN, C_UN, UNROLL)
            ys = ()
            for i in tl.static_range(UNROLL):
                write = dts_writes[2 * i + 1][:, None] * Bs_Cs[2 * i][None, :]
                state = decay(dts_writes[2 * i], rate, cuts[i]) * state + write
                ys += (tl.sum(state * Bs_Cs[2 * i + 1][None, :], axis=1),)
            y_MU = together(ys) + skip[:, None] * tl.trans(x_UM)
            store_tokens(y_ptr, y_MU, begin, stop, m, M, J * M, UNROLL)
        x_UM, dt_UM, B_UN, C_UN = next_x_UM, next_dt_UM, next_B_UN, next_C_UN
    if y_ptr is None:
        out = (batch * segments + number) * (J * M * N) + mn
        tl.store(state_ptr + out, state, mask=here)
        exponent = tl.sum(total_dt, axis=0)[:, None] * rate + tl.sum(total_cut, axis=0)[:, None]
        tl.store(decay_ptr + out, tl.exp2(exponent), mask=here)
    elif number == segments - 1:
        tl.store(state_ptr + batch * (J * M * N) + mn, state, mask=here)


@triton.jit
def combine_kernel(
    local_ptr, decay_ptr, first_ptr, enter_ptr, S, SIZE: tl.constexpr, REVERSED: tl.constexpr, BLOCK: tl.constexpr
):
    """What enters each segment [B, S, SIZE], from what each gives by itself and its decay; ``first`` enters the first
    one (the last one, if REVERSED), or zero."""
    batch = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = entry < SIZE
    value = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        value = tl.load(first_ptr + batch * SIZE + entry, mask=here, other=0.0)
    for step in range(S):
        number = S - 1 - step if REVERSED else step
        at = (batch * S + number) * SIZE + entry
        tl.store(enter_ptr + at, value, mask=here)
        own = tl.load(local_ptr + at, mask=here, other=0.0)
        value = own + tl.load(decay_ptr + at, mask=here, other=0.0) * value


@triton.jit
def place(J: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's sub-head, segment, channels [M], state entries [N], their places in [J, M, N], and their mask."""
    blocks_m = (M + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) % (J * blocks_m)
    head = tile // blocks_m
    m = tile % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    mn = (head * M + m)[:, None] * N + n[None, :]
    return head, tl.program_id(0) // (J * blocks_m), m, n, mn, (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def load_tokens(ptr, begin, stop, index, SIZE: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """A tile [U, index] of COUNT tokens, zero from ``stop`` on: there Δ = 0 leaves the state as it is."""
    token = tl.arange(0, COUNT)
    known = (begin + token < stop)[:, None] & (index < SIZE)[None, :]
    return tl.load(
        ptr + tl.cast(begin, tl.int64) * STRIDE + token[:, None] * STRIDE + index[None, :], mask=known, other=0.0
    )


@triton.jit
def store_tokens(ptr, tile, begin, stop, index, SIZE: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Stores a tile [index, U] of COUNT tokens, up to ``stop``."""
    token = tl.arange(0, COUNT)
    known = (begin + token < stop)[None, :] & (index < SIZE)[:, None]
    ptr += tl.cast(begin, tl.int64) * STRIDE
    tl.store(ptr + token[None, :] * STRIDE + index[:, None], tile.to(ptr.dtype.element_ty), mask=known)


@triton.jit
def load_cuts(seq_ptr, begin, stop, m, seq_t, COUNT: tl.constexpr):
    """[U, M]: −∞ at the tokens where a document starts, other than the row's first one, and 0 elsewhere."""
    token = begin + tl.arange(0, COUNT)
    place = seq_ptr + token.to(tl.int64) * seq_t
    inside = (token > 0) & (token < stop)
    starts = tl.load(place, mask=inside, other=0) != tl.load(place - seq_t, mask=inside, other=0)
    return tl.where(starts, float("-inf"), 0.0)[:, None] + tl.zeros_like(m)[None, :].to(tl.float32)


@triton.jit
def no_cuts(COUNT: tl.constexpr):
    """In place of the rows of ``load_cuts`` where all tokens are of one document."""
    cuts = ()
    for _ in tl.static_range(COUNT):
        cuts += (0.0,)
    return cuts


@triton.jit
def decay(dt, rate, cut):
    """exp(Δ A) [M, N], zero after a cut; ``rate`` is A·log₂e, so that the hardware's power of two serves."""
    exponent = dt[:, None] * rate
    if isinstance(cut, tl.tensor):
        exponent += cut[:, None]
    return tl.exp2(exponent)


@triton.jit
def each(tile, COUNT: tl.constexpr):
    """The rows of a tile [U, index] of COUNT = 4 or 8 tokens, as a vector each."""
    return columns(tl.trans(tile), COUNT)


@triton.jit
def each_of_two(a, b, COUNT: tl.constexpr):
    """The rows of two tiles [U, index] in turn, a's and b's of every token, in float32.

    Two at once halve the exchanges between threads; and the compiler leaves the conversion to float32 before them,
    where a value is converted once and not by every thread that needs it."""
    both = tl.permute(tl.join(a.to(tl.float32), b.to(tl.float32)), (1, 0, 2))
    return columns(tl.reshape(both, (a.shape[1], 2 * COUNT)), 2 * COUNT)


@triton.jit
def columns(tile, COUNT: tl.constexpr):
    """The COUNT = 4, 8 or 16 columns of a tile [index, COUNT]."""
    vectors = halves(halves((tile,)))
    if COUNT >= 8:
        vectors = halves(vectors)
    if COUNT >= 16:
        vectors = halves(vectors)
    flat = ()
    for i in tl.static_range(COUNT):
        flat += (tl.reshape(vectors[i], (vectors[i].shape[0],)),)
    return flat


@triton.jit
def halves(tiles):
    """Takes [index, 2 k] tiles apart into [index, k]: first the even columns of all tiles, then the odd ones. Done
    until k = 1, the columns of the one tile given first come out in their order."""
    even, odd = (), ()
    for i in tl.static_range(len(tiles)):
        pairs = tl.reshape(tiles[i], (tiles[i].shape[0], tiles[i].shape[1] // 2, 2))
        a, b = tl.split(pairs)
        even += (a,)
        odd += (b,)
    return even + odd


@triton.jit
def together(vectors):
    """4 or 8 vectors [index], one a token, as a tile [index, U]."""
    joined = pairs(pairs(vectors))
    if len(vectors) == 8:
        joined = pairs(joined)
    return tl.reshape(joined[0], (vectors[0].shape[0], len(vectors)))


@triton.jit
def last_first(vectors):
    """The same vectors in reverse order."""
    turned = ()
    for i in tl.static_range(len(vectors)):
        turned += (vectors[len(vectors) - 1 - i],)
    return turned


@triton.jit
def pairs(tensors):
    """Joins the k-th of 2 n tensors with the (n + k)-th, in a new last dimension."""
    joined = ()
    for i in tl.static_range(len(tensors) // 2):
        joined += (tl.join(tensors[i], tensors[i + len(tensors) // 2]),)
    return joined
