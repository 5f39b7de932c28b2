"""The backward kernels of the selective scan.

The states are made again a chunk of SAVED_EVERY tokens at a time, from the last chunk to the first: from the state
that entered the chunk (saved by the forward pass) on to the state that enters each block of UNROLL tokens, kept in a
scratch space of the program that stays in the cache, and from there the states of one block at a time, in registers.
Over a block's tokens, from the last to the first, with G_t the gradient of S_t and a_t = exp(Δ_t A):

    G_t = dy_t C_tᵀ + a_{t+1} ∘ G_{t+1}    dC_t = Σ_m dy_t S_t    dB_t = Σ_m Δ_t x_t G_t    d(Δx)_t = Σ_n B_t G_t
    d(Δ A)_t = a_t ∘ G_t ∘ S_{t−1}         dA = Σ_t Δ_t d(Δ A)_t  dΔ_t = Σ_n A d(Δ A)_t + x_t d(Δx)_t

One warp has all 16 channels of a sub-head, so the sums over m stay in it. Segments are as in ``forward``, in reverse.
Letters as there.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from mambify.ops.selective_scan.triton.forward import (
    LOG2E,
    decay,
    each,
    each_of_two,
    last_first,
    load_cuts,
    load_tokens,
    no_cuts,
    place,
    store_tokens,
    together,
)


@triton.jit
def reversed_scan_kernel(
    dt_ptr, A_ptr, C_ptr, seq_ptr, dy_ptr, local_ptr, decay_ptr,
    T, segment, dt_batch, dt_head, C_batch, C_head, seq_batch, seq_t, dy_batch, dy_head,
    DT_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr,
    J: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradient of each segment's entering state by the segment's own outputs, and its decay, [B, S, J, M, N]."""
    head, number, m, n, mn, here = place(J, M, N, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    start = number * segment
    stop = tl.minimum(start + segment, T)
    rate = tl.load(A_ptr + mn, mask=here, other=0.0).to(tl.float32) * LOG2E
    dt_ptr += batch * dt_batch + head * dt_head
    C_ptr += batch * C_batch + head * C_head
    dy_ptr += batch * dy_batch + head * dy_head
    if seq_ptr is not None:
        seq_ptr += batch * seq_batch
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total_dt = tl.zeros((UNROLL, BLOCK_M), tl.float32)
    total_cut = tl.zeros((UNROLL, BLOCK_M), tl.float32)
    blocks = tl.cdiv(stop - start, UNROLL)
    for step in range(blocks):
        begin = start + (blocks - 1 - step) * UNROLL
        dt_UM = load_tokens(dt_ptr, begin, stop, m, M, DT_TOKEN, UNROLL).to(tl.float32)
        dts_dys = each_of_two(dt_UM, load_tokens(dy_ptr, begin, stop, m, M, DY_TOKEN, UNROLL), UNROLL)
        Cs = each(load_tokens(C_ptr, begin, stop, n, N, C_TOKEN, UNROLL).to(tl.float32), UNROLL)
        total_dt += dt_UM
        cuts = no_cuts(UNROLL)
        if seq_ptr is not None:
            cut_UM = load_cuts(seq_ptr, begin, stop, m, seq_t, UNROLL)
            total_cut += cut_UM
            cuts = each(cut_UM, UNROLL)
        for i in tl.static_range(UNROLL - 1, -1, -1):
            gradient += dts_dys[2 * i + 1][:, None] * Cs[i][None, :]
            gradient *= decay(dts_dys[2 * i], rate, cuts[i])
    out = (batch * tl.cdiv(T, segment) + number) * (J * M * N) + mn
    tl.store(local_ptr + out, gradient, mask=here)
    exponent = tl.sum(total_dt, axis=0)[:, None] * rate + tl.sum(total_cut, axis=0)[:, None]
    tl.store(decay_ptr + out, tl.exp2(exponent), mask=here)


@triton.jit
def backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, saved_ptr, seq_ptr, dy_ptr, enter_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dinitial_ptr,
    T, segment, x_batch, x_head, dt_batch, dt_head, B_batch, B_head, C_batch, C_head, seq_batch, seq_t,
    dy_batch, dy_head, part_stride,
    X_TOKEN: tl.constexpr, DT_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr,
    DY_TOKEN: tl.constexpr, J: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SAVED_EVERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """All gradients. ``enter`` [B, S, J, M, N] is the gradient of each segment's last state from after it, or None.
    dA and dD are sums over the segment, [B, S, …]; dB and dC over the program's channels: those of channel block k
    begin at k · ``part_stride``."""
    head, number, m, n, mn, here = place(J, M, N, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    segments = tl.cdiv(T, segment)
    start = number * segment
    stop = tl.minimum(start + segment, T)
    rate = tl.load(A_ptr + mn, mask=here, other=0.0).to(tl.float32) * LOG2E
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if enter_ptr is not None:
        gradient = tl.load(enter_ptr + (batch * segments + number) * (J * M * N) + mn, mask=here, other=0.0)
    skip = tl.zeros((BLOCK_M,), tl.float32)
    if D_ptr is not None:
        skip = tl.load(D_ptr + head * M + m, mask=m < M, other=0.0).to(tl.float32)
    x_ptr += batch * x_batch + head * x_head
    dt_ptr += batch * dt_batch + head * dt_head
    B_ptr += batch * B_batch + head * B_head
    C_ptr += batch * C_batch + head * C_head
    dy_ptr += batch * dy_batch + head * dy_head
    if seq_ptr is not None:
        seq_ptr += batch * seq_batch
    dx_ptr += batch * T * (J * M) + head * M
    ddt_ptr += batch * T * (J * M) + head * M
    part = (tl.program_id(0) % ((M + BLOCK_M - 1) // BLOCK_M)).to(tl.int64)
    dB_ptr += part * part_stride + batch * T * (J * N) + head * N
    dC_ptr += part * part_stride + batch * T * (J * N) + head * N
    saved_ptr += batch * tl.cdiv(T, SAVED_EVERY) * (J * M * N) + mn
    tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    scratch_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * (SAVED_EVERY // UNROLL * BLOCK_M * BLOCK_N) + tile
    dA = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dD_UM = tl.zeros((UNROLL, BLOCK_M), tl.float32)
    chunks = tl.cdiv(stop - start, SAVED_EVERY)
    for step in range(chunks):
        chunk = start + (chunks - 1 - step) * SAVED_EVERY
        blocks = tl.cdiv(tl.minimum(stop - chunk, SAVED_EVERY), UNROLL)
        state = tl.load(saved_ptr + tl.cast(chunk // SAVED_EVERY, tl.int64) * (J * M * N), mask=here, other=0.0)
        tl.store(scratch_ptr, state)
        for block in range(1, blocks):
            begin = chunk + (block - 1) * UNROLL
            x_UM = load_tokens(x_ptr, begin, stop, m, M, X_TOKEN, UNROLL).to(tl.float32)
            dt_UM = load_tokens(dt_ptr, begin, stop, m, M, DT_TOKEN, UNROLL).to(tl.float32)
            dts_writes = each_of_two(dt_UM, dt_UM * x_UM, UNROLL)
            Bs = each(load_tokens(B_ptr, begin, stop, n, N, B_TOKEN, UNROLL).to(tl.float32), UNROLL)
            cuts = no_cuts(UNROLL)
            if seq_ptr is not None:
                cuts = each(load_cuts(seq_ptr, begin, stop, m, seq_t, UNROLL), UNROLL)
            for i in tl.static_range(UNROLL):
                write = dts_writes[2 * i + 1][:, None] * Bs[i][None, :]
                state = decay(dts_writes[2 * i], rate, cuts[i]) * state + write
            tl.store(scratch_ptr + block * (BLOCK_M * BLOCK_N), state)
        tl.debug_barrier()  # what is read below is written above
        for block_step in range(blocks):
            block = blocks - 1 - block_step
            begin = chunk + block * UNROLL
            x_UM = load_tokens(x_ptr, begin, stop, m, M, X_TOKEN, UNROLL).to(tl.float32)
            dt_UM = load_tokens(dt_ptr, begin, stop, m, M, DT_TOKEN, UNROLL).to(tl.float32)
            dy_UM = load_tokens(dy_ptr, begin, stop, m, M, DY_TOKEN, UNROLL).to(tl.float32)
            B_UN = load_tokens(B_ptr, begin, stop, n, N, B_TOKEN, UNROLL)
            C_UN = load_tokens(C_ptr, begin, stop, n, N, C_TOKEN, UNROLL)
            dts_writes, dys = each_of_two(dt_UM, dt_UM * x_UM, UNROLL), each(dy_UM, UNROLL)
            Bs_Cs = each_of_two(B_UN, C_UN, UNROLL)
            cuts = no_cuts(UNROLL)
            if seq_ptr is not None:
                cuts = each(load_cuts(seq_ptr, begin, stop, m, seq_t, UNROLL), UNROLL)
            states = (tl.load(scratch_ptr + block * (BLOCK_M * BLOCK_N)),)  # before each token
            dCs = ()
            for i in tl.static_range(UNROLL):
                write = dts_writes[2 * i + 1][:, None] * Bs_Cs[2 * i][None, :]
                state = decay(dts_writes[2 * i], rate, cuts[i]) * states[i] + write
                dCs += (tl.sum(dys[i][:, None] * state, axis=0).to(dC_ptr.dtype.element_ty),)
                states += (state,)
            store_tokens(dC_ptr, together(dCs), begin, stop, n, N, J * N, UNROLL)
            dwrites, dexponents, dBs = (), (), ()
            for i in tl.static_range(UNROLL - 1, -1, -1):
                dt, x_dt, dy = dts_writes[2 * i][:, None], dts_writes[2 * i + 1][:, None], dys[i][:, None]
                gradient += dy * Bs_Cs[2 * i + 1][None, :]
                dBs += (tl.sum(x_dt * gradient, axis=0).to(dB_ptr.dtype.element_ty),)
                dwrites += (tl.sum(gradient * Bs_Cs[2 * i][None, :], axis=1),)
                gradient *= decay(dts_writes[2 * i], rate, cuts[i])
                dexponent = gradient * states[i]
                dA += dexponent * dt
                dexponents += (tl.sum(dexponent * rate, axis=1),)
            dwrite_MU = together(last_first(dwrites))
            dx_MU = dwrite_MU * tl.trans(dt_UM) + skip[:, None] * tl.trans(dy_UM)
            ddt_MU = together(last_first(dexponents)) * (1 / LOG2E) + dwrite_MU * tl.trans(x_UM)
            dD_UM += dy_UM * x_UM
            store_tokens(dx_ptr, dx_MU, begin, stop, m, M, J * M, UNROLL)
            store_tokens(ddt_ptr, ddt_MU, begin, stop, m, M, J * M, UNROLL)
            store_tokens(dB_ptr, together(last_first(dBs)), begin, stop, n, N, J * N, UNROLL)
        tl.debug_barrier()  # before the scratch space is written again
    tl.store(dA_ptr + (batch * segments + number) * (J * M * N) + mn, dA, mask=here)
    if dD_ptr is not None:
        tl.store(dD_ptr + (batch * segments + number) * (J * M) + head * M + m, tl.sum(dD_UM, axis=0), mask=m < M)
    if dinitial_ptr is not None and number == 0:
        tl.store(dinitial_ptr + batch * (J * M * N) + mn, gradient, mask=here)
