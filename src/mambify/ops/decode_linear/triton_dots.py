"""Linear layers of three to sixteen rows on tensor cores, as one Triton kernel.

From a handful of rows on, multiplying them one after another in plain float32 takes longer than reading the weights.
Here a warp by itself has 16 outputs and goes along all inputs, its next tiles of the weights on their way to shared
memory while the present one is multiplied with all rows at once. A tile of 16 × 8 is the least that tensor cores make,
so weights are the left factor, and rows of x, few as they are, the columns of the right one.

As in the kernel for fewer rows (:mod:`mambify.ops.decode_linear.triton_rows`), nothing is put together from parts, and
an RMSNorm before is a factor at the end. Norm times x is rounded to the weights' dtype, as it is where the norm is a
kernel of its own.

Letters: M rows, D inputs, O outputs; in kernels BLOCK_O × BLOCK_D is a tile of a weight, COLUMNS what M is padded to.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambify.ops.decode_linear.outputs import Outputs
from mambify.ops.decode_linear.triton_ends import biased_and_gated, written_to
from mambify.ops.overlap import launch_options, wait_for_others

FEWEST_ROWS, MOST_ROWS = 3, 16
_OUTPUTS = 16  # of a tile
_VECTOR = 8  # neighbouring entries of x whose squares are summed in one thread


class Tiles(NamedTuple):
    """How the work is cut.

    Attributes:
        outputs, inputs: of a tile of a weight; powers of two, at least 16.
        stages: tiles on their way at once.
        warps: of a program.
    """

    outputs: int
    inputs: int
    stages: int
    warps: int


def tiles_of(inputs: int, *, gated: bool) -> Tiles:
    """Narrow tiles with about a thousand inputs on their way, which an H100 read fastest; a gated program has two tiles
    at a time."""
    widths = (128, 64) if gated else (256, 128, 64)
    width = next((width for width in widths if inputs % width == 0), 128)
    return Tiles(_OUTPUTS, width, 4 if gated else min(1024 // width, 8), 1)


def num_programs(heights: Iterable[int]) -> int:
    """For weights of so many outputs each, with the tiles of :func:`tiles_of`."""
    return sum(-(-height // _OUTPUTS) for height in heights)


def decode_linear(
    x_MD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_D: Tensor | None,
    eps: float,
    gated: bool,
    add_to_MO: Tensor | None,
    overlap: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`; ``tiles``: by default what suits."""
    M, D = x_MD.shape
    outputs = Outputs.of(M, weights, biases, add_to_MO, gated=gated)
    y_MO, tiles = outputs.y_MO, tiles or tiles_of(D, gated=gated)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        _products[outputs.grid(tiles.outputs)](
            x_MD, norm_D, y_MO, *outputs.weights, *outputs.biases, eps, x_MD.stride(0), y_MO.stride(0),
            M=M, COLUMNS=8 if M <= 8 else 16, D=D, **outputs.sizes, GATED=gated,
            ADD=add_to_MO is not None, BLOCK_O=tiles.outputs, BLOCK_D=tiles.inputs, STAGES=tiles.stages, VEC=_VECTOR,
            num_warps=tiles.warps, **launch_options(overlap),
        )  # fmt: skip
    return y_MO


@triton.jit
def _products(
    x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, eps, x_row, y_row,
    M: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    GATED: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    wait_for_others(OVERLAP)
    if GATED:
        _outputs(
            x_ptr, norm_ptr, y_ptr, w0_ptr, w1_ptr, b0_ptr, b1_ptr, pid, eps, x_row, y_row,
            M, COLUMNS, D, O0, True, ADD, BLOCK_O, BLOCK_D, STAGES, VEC,
        )  # fmt: skip
    else:
        ends0: tl.constexpr = (O0 + BLOCK_O - 1) // BLOCK_O
        ends1: tl.constexpr = ends0 + (O1 + BLOCK_O - 1) // BLOCK_O
        if pid < ends0:
            _outputs(
                x_ptr, norm_ptr, y_ptr, w0_ptr, w0_ptr, b0_ptr, None, pid, eps, x_row, y_row,
                M, COLUMNS, D, O0, False, ADD, BLOCK_O, BLOCK_D, STAGES, VEC,
            )  # fmt: skip
        if O1 > 0:  # noqa: SIM102 (known when it is compiled)
            if (pid >= ends0) & (pid < ends1):
                _outputs(
                    x_ptr, norm_ptr, y_ptr + O0, w1_ptr, w1_ptr, b1_ptr, None, pid - ends0, eps, x_row, y_row,
                    M, COLUMNS, D, O1, False, ADD, BLOCK_O, BLOCK_D, STAGES, VEC,
                )  # fmt: skip
        if O2 > 0:  # noqa: SIM102
            if pid >= ends1:
                _outputs(
                    x_ptr, norm_ptr, y_ptr + O0 + O1, w2_ptr, w2_ptr, b2_ptr, None, pid - ends1, eps, x_row, y_row,
                    M, COLUMNS, D, O2, False, ADD, BLOCK_O, BLOCK_D, STAGES, VEC,
                )  # fmt: skip


@triton.jit
def _outputs(
    x_ptr, norm_ptr, y_ptr, w_ptr, up_ptr, b_ptr, up_b_ptr, block, eps, x_row, y_row,
    M: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, O: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK_O outputs of one weight, or of a pair of them, of all rows."""
    E: tl.constexpr = BLOCK_D // VEC
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    d, m = tl.arange(0, BLOCK_D), tl.arange(0, COLUMNS)
    tile = tl.minimum(o, O - 1).to(tl.int64)[:, None] * D + d[None, :]  # rows beyond the last read it again
    x_ptr += m[:, None] * x_row + d[None, :]
    given = (m < M)[:, None]
    y = tl.zeros((BLOCK_O, COLUMNS), tl.float32)
    up_y = tl.zeros((BLOCK_O, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS, E), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        w = _load(w_ptr + tile, start, d, D, BLOCK_D)
        if D % BLOCK_D == 0:
            x = tl.load(x_ptr + start, mask=given, other=0.0)
        else:
            x = tl.load(x_ptr + start, mask=given & (start + d < D)[None, :], other=0.0)
        if norm_ptr is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, (COLUMNS, E, VEC)), 2)
            norm = tl.load(norm_ptr + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            x = wide * norm[None, :]
        x = tl.trans(x.to(w.dtype))
        y = tl.dot(w, x, y, input_precision="ieee")
        if GATED:
            up_y = tl.dot(_load(up_ptr + tile, start, d, D, BLOCK_D), x, up_y, input_precision="ieee")
    if norm_ptr is not None:
        scale_M = tl.rsqrt(tl.sum(squares, 1) / D + eps)[None, :]
        y *= scale_M
        up_y *= scale_M
    y = biased_and_gated(y, up_y, b_ptr, up_b_ptr, o, O, GATED)
    written_to(y_ptr, y, o, m, y_row, M, O, ADD)


@triton.jit
def _load(tile_ptr, start, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of the weight from input ``start`` on, zero beyond its end; read once."""
    if D % BLOCK_D == 0:
        tile = tl.load(tile_ptr + start, eviction_policy="evict_first")
    else:
        tile = tl.load(tile_ptr + start, mask=(start + d < D)[None, :], other=0.0, eviction_policy="evict_first")
    return tile
