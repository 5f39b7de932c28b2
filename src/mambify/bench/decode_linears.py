"""The linear layers of a decoding step by themselves, for ``mambify bench decode``: bytes of weights a second.

Each has several copies of its weights, more than a cache holds, and is recorded. PyTorch's own products stand beside
the kernel that has norm, gate or sum inside; theirs are kernels of their own, and part of the time.

Letters: M rows, D inputs, F inner size, E outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambify.bench.clock import device_seconds_of
from mambify.bench.shapes import MAMBA_SHAPES, SHAPES
from mambify.ops.backends import HAS_TRITON
from mambify.ops.decode_linear import decode_linear

if HAS_TRITON:
    from mambify.ops.decode_linear import triton_dots, triton_rows, triton_shared

_BLOCKS = (2, 4, 8)  # outputs a program
_WARPS = (2, 4, 8, 16)  # that share a small layer's inputs
#: outputs, inputs, stages and warps of a program on tensor cores
_TILES = (
    (16, 256, 3, 1),
    (16, 256, 4, 1),
    (16, 128, 4, 1),
    (16, 128, 6, 1),
    (32, 128, 4, 1),
    (32, 256, 3, 2),
    (64, 128, 4, 4),
)
_BYTES = {"cpu": 2**22, "cuda": 2**29}  # of all copies: ten times an H100's cache


class Linear(NamedTuple):
    """One of a step's products.

    Attributes:
        heights: outputs of each of its weights.
        normed, gated, adds: what is inside.
    """

    inputs: int
    heights: tuple[int, ...]
    normed: bool = False
    gated: bool = False
    adds: bool = False


def linears_of(name: str) -> dict[str, Linear]:
    """The products of a Transformer's and a Mamba2 layer, and the head; or those of a published Mamba1 layer.

    Args:
        name: of a shape in :mod:`mambify.bench.shapes`.
    """
    if name in MAMBA_SHAPES:
        stock = MAMBA_SHAPES[name]
        inner = 2 * stock.hidden
        return {
            "in_proj": Linear(stock.hidden, (2 * inner,), normed=True),
            "x_proj": Linear(inner, (stock.rank + 2 * stock.state,)),
            "out_proj": Linear(inner, (stock.hidden,), adds=True),
        }
    s = SHAPES[name]
    wide, narrow = s.heads * s.head_dim, s.groups * s.head_dim
    return {
        "q, k, v": Linear(s.hidden, (wide, narrow, narrow), normed=True),
        "in_proj": Linear(s.hidden, (2 * wide + 2 * narrow + s.heads,), normed=True),
        "out_proj": Linear(wide, (s.hidden,), adds=True),
        "gate, up": Linear(s.hidden, (s.intermediate, s.intermediate), normed=True, gated=True),
        "down": Linear(s.intermediate, (s.hidden,), adds=True),
        "head": Linear(s.hidden, (s.vocabulary,), normed=True),
    }


def read_rates(linear: Linear, rows: int, device: str, dtype: torch.dtype, *, tiles: bool = False) -> dict[str, Any]:
    """Bytes of weights a second, by way: PyTorch's products, ours as it is chosen, overlapping, and by either kernel.

    A way that fails has its error in place of a number.

    Args:
        tiles: the kernel on tensor cores with tiles of several sizes instead, the one by rows with other blocks, and
            of small layers the one whose warps share inputs with several numbers of warps.
    """
    size = sum(linear.heights) * linear.inputs * dtype.itemsize
    copies = max(2, _BYTES[torch.device(device).type] // size)
    x_MD = torch.randn(rows, linear.inputs, device=device, dtype=dtype)
    norm_D = torch.rand(linear.inputs, device=device, dtype=dtype) if linear.normed else None
    weights = [
        [torch.randn(height, linear.inputs, device=device, dtype=dtype) / 64 for height in linear.heights]
        for _ in range(copies)
    ]
    sum_MO = torch.zeros(rows, sum(linear.heights), device=device, dtype=dtype) if linear.adds else None

    def public(**settings: Any) -> Callable[[list[Tensor]], Tensor]:
        return lambda each: decode_linear(
            x_MD, each, norm_D=norm_D, eps=1e-5, gated=linear.gated, add_to_MO=sum_MO, **settings
        )  # fmt: skip

    none = [None] * len(linear.heights)

    def streamed(block: int) -> Callable[[list[Tensor]], Tensor]:
        return lambda each: triton_rows.decode_linear(
            x_MD, each, none, norm_D, 1e-5, linear.gated, sum_MO, None, False, block
        )  # fmt: skip

    def on_tensor_cores(shape: tuple[int, ...] | None) -> Callable[[list[Tensor]], Tensor]:
        chosen = None if shape is None else triton_dots.Tiles(*shape)
        return lambda each: triton_dots.decode_linear(
            x_MD, each, none, norm_D, 1e-5, linear.gated, sum_MO, False, chosen
        )  # fmt: skip

    def shared(warps: int) -> Callable[[list[Tensor]], Tensor]:
        return lambda each: triton_shared.decode_linear(
            x_MD, each, none, norm_D, 1e-5, linear.gated, sum_MO, None, False, warps
        )  # fmt: skip

    ways = {"torch": public(backend="reference")}
    if torch.device(device).type == "cuda":
        outputs = linear.heights[0] if linear.gated else sum(linear.heights)
        few = rows <= triton_rows.MOST_ROWS
        if tiles:
            ways |= {f"block {block}": streamed(block) for block in _BLOCKS if few}
            ways |= {f"tiles {'×'.join(map(str, shape))}": on_tensor_cores(shape) for shape in _TILES}
            small = linear.inputs <= triton_shared.MOST_INPUTS
            ways |= {f"shared by {warps}": shared(warps) for warps in _WARPS if small}
        else:
            ways |= {"ours": public(backend="triton"), "overlap": public(backend="triton", overlap=True)}
            ways |= {"rows": streamed(triton_rows.block_of(rows, outputs, gated=linear.gated))} if few else {}
            ways |= {"tensor cores": on_tensor_cores(None)}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, way in ways.items():
            try:
                seconds = device_seconds_of(lambda way=way: [way(each) for each in weights], device)  # type: ignore[misc]
            except Exception as error:  # one way of several, each its own kernel
                found[name] = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                found[name] = copies * size / seconds
    return found
