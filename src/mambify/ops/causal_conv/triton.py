"""The depthwise causal convolution as Triton kernels: every input is read once and walks through registers.

A program has ROWS stretches of TOKENS consecutive tokens and BLOCK_C channels. It goes over its stretches token by
token, all of them at once, and keeps the K − 1 inputs before the present one in registers (``window``): a document
that ends empties the window. Loads come UNROLL tokens at a time, ahead of their use, so that enough of them are under
way. The backward pass makes the sum before the activation again instead of reading it, and walks forward too: the
gradient of an input is complete K − 1 tokens later (``pending``).

The token stride is a compile-time constant: addresses become offsets within the load instruction, and a stride that
is not a multiple of eight (an in_proj with one output a head at its end) is known to forbid wide loads.

Letters: B batch, T tokens, C channels, K width, L = K − 1; in kernels R = ROWS stretches, C = BLOCK_C channels.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.backends import last_adjacent

_FULL = 132 * 32  # warps that keep an H100 busy: 132 multiprocessors, half of the 64 warps that each can hold


class _Tiles(NamedTuple):
    """How the work is cut: ROWS stretches of TOKENS tokens and BLOCK_C channels a program, one warp a stretch."""

    ROWS: int
    TOKENS: int
    BLOCK_C: int

    @property
    def span(self) -> int:
        """Tokens of a program."""
        return self.ROWS * self.TOKENS

    def grid(self, batch: int, tokens: int, channels: int) -> tuple[int, int]:
        """Channel blocks come first: programs that run together read neighbouring memory."""
        return triton.cdiv(channels, self.BLOCK_C) * triton.cdiv(tokens, self.span), batch

    def whole(self, tokens: int, channels: int) -> bool:
        """Whether every program has all of its tokens and channels, so that nothing needs a mask."""
        return tokens % self.span == 0 and channels % self.BLOCK_C == 0


def _tiles(batch: int, tokens: int, channels: int, *, backward: bool) -> _Tiles:
    """Stretches are short where the work would not fill the GPU; long ones reread fewer tokens (K − 1 each).

    A thread has two channels, so that a warp reads 128 bytes of bfloat16 at a time, or four where they divide. Two is
    enough for the backward pass, whose registers are full; its stretches are longer, for they go K − 1 over their end.
    """
    rows, block_c = (2, 128) if channels % 128 == 0 and not backward else (4, 64)
    lengths = (128, 64, 32) if backward else (64, 32, 16)
    blocks_c = triton.cdiv(channels, block_c)
    fills = (n for n in lengths if batch * triton.cdiv(tokens, n) * blocks_c >= _FULL)
    return _Tiles(rows, next(fills, lengths[-1]), block_c)


def supports(x_BTC: Tensor, weight_CK: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these inputs: widths 2 to 8, at most float32."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    given = [v for v in (x_BTC, weight_CK, *others) if v is not None]
    return 2 <= weight_CK.shape[1] <= 8 and all(v.dtype in dtypes for v in given)


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    silu: bool,
    initial_state_BCL: Tensor | None,
    seq_idx_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.causal_conv.causal_conv`."""
    return _apply(x_BTC, weight_CK, bias_C, initial_state_BCL, seq_idx_BT, silu)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        initial_BCL: Tensor | None,
        seq_idx_BT: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, channels = x_BTC.shape
        width = weight_CK.shape[1]
        x_BTC = last_adjacent(x_BTC)
        bias_C = None if bias_C is None else bias_C.contiguous()
        y_BTC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
        final_BCL = x_BTC.new_empty((batch, channels, width - 1))
        tiles = _tiles(batch, tokens, channels, backward=False)
        _forward[tiles.grid(batch, tokens, channels)](
            x_BTC, weight_CK, bias_C, initial_BCL, seq_idx_BT, y_BTC, final_BCL,
            tokens, channels, x_BTC.stride(0), *weight_CK.stride(), *_strides(initial_BCL, 3), *_strides(seq_idx_BT, 2),
            X_TOKEN=x_BTC.stride(1), K=width, SILU=silu, **tiles._asdict(), UNROLL=16 if tiles.TOKENS == 16 else 8,
            WHOLE=tiles.whole(tokens, channels), num_warps=tiles.ROWS,
        )  # fmt: skip
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, initial_BCL, seq_idx_BT)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y_BTC, final_BCL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor | None, dfinal_BCL: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTC, weight_CK, bias_C, initial_BCL, seq_idx_BT = ctx.saved_tensors
        batch, tokens, channels = x_BTC.shape
        width = weight_CK.shape[1]
        dy_BTC = torch.zeros_like(x_BTC) if dy_BTC is None else last_adjacent(dy_BTC)
        dx_BTC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
        dinitial_BCL = None if initial_BCL is None else initial_BCL.new_empty(initial_BCL.shape)
        tiles = _tiles(batch, tokens, channels, backward=True)
        partial = None
        if any(ctx.needs_input_grad[1:3]):
            parts = triton.cdiv(tokens, tiles.span)
            partial = x_BTC.new_empty((batch * parts, width + 1, channels), dtype=torch.float32)
        _backward[tiles.grid(batch, tokens, channels)](
            x_BTC, weight_CK, bias_C, initial_BCL, seq_idx_BT, dy_BTC, dfinal_BCL, dx_BTC, dinitial_BCL, partial,
            tokens, channels, x_BTC.stride(0), *weight_CK.stride(), *_strides(initial_BCL, 3), *_strides(seq_idx_BT, 2),
            dy_BTC.stride(0), *_strides(dfinal_BCL, 3),
            X_TOKEN=x_BTC.stride(1), DY_TOKEN=dy_BTC.stride(1), K=width, SILU=ctx.silu, **tiles._asdict(),
            UNROLL=8, WHOLE=tiles.whole(tokens, channels), num_warps=tiles.ROWS,
        )  # fmt: skip
        dweight_CK = dbias_C = None
        if partial is not None:
            total = partial.sum(0)
            dweight_CK = total[:width].mT.to(weight_CK.dtype)
            dbias_C = None if bias_C is None else total[width].to(bias_C.dtype)
        return dx_BTC, dweight_CK, dbias_C, dinitial_BCL, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _CausalConv.apply


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_ptr, y_ptr, final_ptr,
    T, C, x_batch, weight_c, weight_k, initial_batch, initial_c, initial_l, seq_batch, seq_t,
    X_TOKEN: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    block, channel, first, here = _place(C, ROWS, TOKENS, BLOCK_C)
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * x_batch
    y_ptr += batch * T * C
    if initial_ptr is not None:
        initial_ptr += batch * initial_batch
    if seq_ptr is not None:
        seq_ptr += batch * seq_batch
    taps, bias = _weights(weight_ptr, bias_ptr, channel, here, weight_c, weight_k, K)
    window, starts = _history(
        x_ptr, initial_ptr, seq_ptr, first, channel, here, T, initial_c, initial_l, seq_t, X_TOKEN, K
    )
    x_rows = _rows(x_ptr, first, channel, X_TOKEN)
    y_rows = _rows(y_ptr, first, channel, C)
    for begin in range(0, TOKENS, UNROLL):
        xs = _load_tokens(x_rows, first + begin, here, T, X_TOKEN, UNROLL, WHOLE)
        if seq_ptr is not None:
            starts = _more_starts(starts, seq_ptr, first + begin, seq_t, T, K, UNROLL)
        for i in tl.static_range(UNROLL):
            token = first + begin + i
            if seq_ptr is not None:
                window = _emptied(window, starts, i, K)
            window += (xs[i].to(tl.float32),)
            total = _sum_taps(window, taps, bias, K)
            if SILU:
                total = total * tl.sigmoid(total)
            y = total.to(y_ptr.dtype.element_ty)
            if WHOLE:
                tl.store(y_rows + i * C, y)
            else:
                tl.store(y_rows + i * C, y, mask=(token < T)[:, None] & here)
            window = window[1:]
        starts >>= UNROLL
        x_rows += UNROLL * X_TOKEN
        y_rows += UNROLL * C
    if block == (T - 1) // (ROWS * TOKENS):
        _store_final(
            x_ptr, initial_ptr, seq_ptr, final_ptr + batch * C * (K - 1), channel, T, C, initial_c, initial_l, seq_t,
            X_TOKEN, K,
        )  # fmt: skip


@triton.jit
def _backward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_ptr, dy_ptr, dfinal_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    T, C, x_batch, weight_c, weight_k, initial_batch, initial_c, initial_l, seq_batch, seq_t,
    dy_batch, dfinal_batch, dfinal_c, dfinal_l,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    block, channel, first, here = _place(C, ROWS, TOKENS, BLOCK_C)
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * x_batch
    dy_ptr += batch * dy_batch
    dx_ptr += batch * T * C
    if initial_ptr is not None:
        initial_ptr += batch * initial_batch
    if dinitial_ptr is not None:
        dinitial_ptr += batch * C * (K - 1)
    if dfinal_ptr is not None:
        dfinal_ptr += batch * dfinal_batch
    if seq_ptr is not None:
        seq_ptr += batch * seq_batch
    taps, bias = _weights(weight_ptr, bias_ptr, channel, here, weight_c, weight_k, K)
    window, starts = _history(
        x_ptr, initial_ptr, seq_ptr, first, channel, here, T, initial_c, initial_l, seq_t, X_TOKEN, K
    )
    x_rows = _rows(x_ptr, first, channel, X_TOKEN)
    dy_rows = _rows(dy_ptr, first, channel, DY_TOKEN)
    pending = _zeros(K - 1, ROWS, BLOCK_C)
    sums = _zeros(K + 1, ROWS, BLOCK_C)  # gradients of the taps, and of the bias
    for begin in range(0, TOKENS, UNROLL):
        window, starts, pending, sums = _backward_tokens(
            x_rows, dy_rows, dx_ptr, dinitial_ptr, dfinal_ptr, seq_ptr, first, begin, channel, here, taps, bias,
            window, starts, pending, sums, T, C, dfinal_c, dfinal_l, seq_t, X_TOKEN, DY_TOKEN, K, SILU, UNROLL,
            partial_ptr is not None, WHOLE,
        )  # fmt: skip
        x_rows += UNROLL * X_TOKEN
        dy_rows += UNROLL * DY_TOKEN
    # The next stretch's first tokens complete the gradients of this one's last inputs.
    _backward_tokens(
        x_rows, dy_rows, dx_ptr, dinitial_ptr, dfinal_ptr, seq_ptr, first, TOKENS, channel, here, taps, bias,
        window, starts, pending, sums, T, C, dfinal_c, dfinal_l, seq_t, X_TOKEN, DY_TOKEN, K, SILU, K - 1, False, False,
    )  # fmt: skip
    if partial_ptr is not None:
        part = batch * tl.cdiv(T, ROWS * TOKENS) + block
        for k in tl.static_range(K + 1):
            place = partial_ptr + (part * (K + 1) + k) * C + channel
            tl.store(place, tl.sum(sums[k], axis=0), mask=channel < C)


@triton.jit
def _backward_tokens(
    x_rows, dy_rows, dx_ptr, dinitial_ptr, dfinal_ptr, seq_ptr, first, begin, channel, here, taps, bias,
    window, starts, pending, sums, T, C, dfinal_c, dfinal_l, seq_t,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, COUNT: tl.constexpr,
    COUNTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """COUNT tokens of every stretch from ``begin`` on; COUNTED: they add to the gradients of taps and bias."""
    xs = _load_tokens(x_rows, first + begin, here, T, X_TOKEN, COUNT, WHOLE)
    dys = _load_tokens(dy_rows, first + begin, here, T, DY_TOKEN, COUNT, WHOLE)
    if seq_ptr is not None:
        starts = _more_starts(starts, seq_ptr, first + begin, seq_t, T, K, COUNT)
    dx_rows = _rows(dx_ptr, first + (begin - (K - 1)), channel, C)
    for i in tl.static_range(COUNT):
        token = first + begin + i
        if seq_ptr is not None:
            window = _emptied(window, starts, i, K)
        window += (xs[i].to(tl.float32),)
        dsum = dys[i].to(tl.float32)
        if SILU:
            total = _sum_taps(window, taps, bias, K)
            gate = tl.sigmoid(total)
            dsum *= gate * (1 + total * (1 - gate))
        if COUNTED:
            added = ()
            for k in tl.static_range(K):
                added += (sums[k] + dsum * window[k],)
            added += (sums[K] + dsum,)
            sums = added
        # This token reaches the inputs of its own document up to K − 1 tokens back; that of K − 1 back is complete.
        reached = (dsum * taps[K - 1],)
        for back in tl.static_range(1, K):
            own = dsum
            if seq_ptr is not None:
                own = tl.where(_same_document(starts, i, back, K)[:, None], dsum, 0.0)
            reached += (pending[back - 1] + own * taps[K - 1 - back],)
        source = token - (K - 1)
        dx = reached[K - 1]
        if dfinal_ptr is not None:
            kept = source - (T - (K - 1))  # its place in the final state, if 0 or more
            carried = (kept >= 0) & (source < T)
            if seq_ptr is not None:
                carried = carried & _same_document(starts, i, K - 1, K)  # nothing starts from T on
            place = dfinal_ptr + channel[None, :] * dfinal_c + kept[:, None] * dfinal_l
            dx += tl.load(place, mask=carried[:, None] & here, other=0.0).to(tl.float32)
        # An input before the first token is the initial state's; before any other stretch, the previous stretch's.
        dx_here = dx.to(dx_ptr.dtype.element_ty)
        if WHOLE and i >= K - 1:
            tl.store(dx_rows + i * C, dx_here)
        else:
            own_input = (begin + i >= K - 1) & (source < T)
            tl.store(dx_rows + i * C, dx_here, mask=own_input[:, None] & here)
        if dinitial_ptr is not None:
            place = dinitial_ptr + channel[None, :] * (K - 1) + token[:, None]
            tl.store(place, dx.to(dinitial_ptr.dtype.element_ty), mask=(source < 0)[:, None] & here)
        window = window[1:]
        pending = reached[: K - 1]
    return window, starts >> COUNT, pending, sums


@triton.jit
def _place(C, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's token block, its channels [C], the first token of each stretch [R], the channels' mask [1, C]."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) // blocks_c
    channel = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (block * ROWS + tl.arange(0, ROWS)) * TOKENS
    return block, channel, first, (channel < C)[None, :]


@triton.jit
def _rows(ptr, token, channel, stride):
    """Pointers [R, C] to one token of each stretch."""
    return ptr + token.to(tl.int64)[:, None] * stride + channel[None, :]


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((ROWS, BLOCK_C), tl.float32),)
    return zeros


@triton.jit
def _load_tokens(rows, token, here, T, STRIDE: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """COUNT tokens of each stretch from ``token`` [R] on, zero from T on; WHOLE: all of them are there."""
    loaded = ()
    for i in tl.static_range(COUNT):
        if WHOLE:
            loaded += (tl.load(rows + i * STRIDE),)
        else:
            loaded += (tl.load(rows + i * STRIDE, mask=(token + i < T)[:, None] & here, other=0.0),)
    return loaded


@triton.jit
def _weights(weight_ptr, bias_ptr, channel, here, weight_c, weight_k, K: tl.constexpr):
    """The K taps and the bias, [1, C] in float32."""
    taps = ()
    for k in tl.static_range(K):
        place = weight_ptr + channel[None, :] * weight_c + k * weight_k
        taps += (tl.load(place, mask=here, other=0.0).to(tl.float32),)
    if bias_ptr is None:
        bias = tl.zeros_like(taps[0])
    else:
        bias = tl.load(bias_ptr + channel[None, :], mask=here, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _history(
    x_ptr, initial_ptr, seq_ptr, first, channel, here, T, initial_c, initial_l, seq_t,
    X_TOKEN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The K − 1 inputs before each stretch, zero where of another document than the last, and where documents start
    among them: bit i of [R] for input i."""
    starts = tl.zeros_like(first)
    if seq_ptr is not None:
        starts = _starts(seq_ptr, first - (K - 1), seq_t, T, K - 1)
    window = ()
    for i in tl.static_range(K - 1):
        token = first - (K - 1) + i
        same = (starts >> (i + 1)) == 0
        seen = (same & (token >= 0) & (token < T))[:, None] & here
        x = tl.load(_rows(x_ptr, token, channel, X_TOKEN), mask=seen, other=0.0)
        if initial_ptr is not None:
            place = initial_ptr + channel[None, :] * initial_c + (token + (K - 1))[:, None] * initial_l
            carried = (same & (token < 0))[:, None] & here
            initial = tl.load(place, mask=carried, other=0.0).to(x_ptr.dtype.element_ty)
            x = tl.where((token < 0)[:, None], initial, x)
        window += (x.to(tl.float32),)
    return window, starts


@triton.jit
def _starts(seq_ptr, token, seq_t, T, COUNT: tl.constexpr):
    """Bit i of [R] is set where a document starts at ``token + i``; none does at the row's first token."""
    place = seq_ptr + token.to(tl.int64) * seq_t
    before = tl.load(place - seq_t, mask=(token >= 1) & (token <= T), other=0)
    starts = tl.zeros_like(token)
    for i in tl.static_range(COUNT):
        inside = (token + i >= 0) & (token + i < T)
        document = tl.load(place + i * seq_t, mask=inside, other=0)
        starts |= tl.where(inside & (token + i >= 1) & (document != before), 1 << i, 0)
        before = document
    return starts


@triton.jit
def _more_starts(starts, seq_ptr, token, seq_t, T, K: tl.constexpr, COUNT: tl.constexpr):
    """Bits 0 to K − 2 of ``starts`` are the K − 1 tokens before; the next COUNT tokens' bits come above them."""
    return starts | (_starts(seq_ptr, token, seq_t, T, COUNT) << (K - 1))


@triton.jit
def _same_document(starts, i: tl.constexpr, back: tl.constexpr, K: tl.constexpr):
    """Whether token i of the present ones and the one ``back`` before it are of one document."""
    return (starts & (((1 << back) - 1) << (K + i - back))) == 0


@triton.jit
def _emptied(window, starts, i: tl.constexpr, K: tl.constexpr):
    """The window with zeros where a document starts at token i."""
    same = _same_document(starts, i, 1, K)
    emptied = ()
    for k in tl.static_range(len(window)):
        emptied += (tl.where(same[:, None], window[k], 0.0),)
    return emptied


@triton.jit
def _sum_taps(window, taps, bias, K: tl.constexpr):
    total = bias + window[0] * taps[0]
    for k in tl.static_range(1, K):
        total += window[k] * taps[k]
    return total


@triton.jit
def _store_final(
    x_ptr, initial_ptr, seq_ptr, final_ptr, channel, T, C, initial_c, initial_l, seq_t,
    X_TOKEN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The last K − 1 inputs, from the last to the first; zero from where an earlier document is met."""
    same = channel < C
    last = tl.zeros_like(channel) + (T - 1)
    if seq_ptr is not None:
        document = tl.load(seq_ptr + last.to(tl.int64) * seq_t)
    for back in tl.static_range(K - 1):
        token = last - back
        if seq_ptr is not None:
            # Once an earlier document is met, all before it are earlier too, even one of the same id.
            known = token >= 0  # the initial state is of the first token's document
            same = same & (~known | (tl.load(seq_ptr + token.to(tl.int64) * seq_t, mask=known, other=0) == document))
        x = tl.load(x_ptr + token.to(tl.int64) * X_TOKEN + channel, mask=same & (token >= 0), other=0.0)
        if initial_ptr is not None:
            place = initial_ptr + channel * initial_c + (token + (K - 1)) * initial_l
            initial = tl.load(place, mask=same & (token < 0), other=0.0)
            x = tl.where(token < 0, initial.to(x_ptr.dtype.element_ty), x)
        tl.store(final_ptr + channel * (K - 1) + (K - 2 - back), x, mask=channel < C)
