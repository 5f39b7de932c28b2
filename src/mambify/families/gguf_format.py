"""The GGUF container: metadata and tensor table, then one tensor at a time, dequantised a few rows at once.

Written out here because the ``gguf`` package's own reader maps the whole file and keeps an object for every token of
the vocabulary: on SmolLM2 that is a third of the model's size. The quantisation formats are the package's.

Layout (little endian): ``GGUF``, version u32, number of tensors u64, number of metadata entries u64; entries of key,
type, value; tensor records of name, number of dimensions, dimensions (fastest first), type, offset; aligned data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mambify.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
#: value type → struct code
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ELEMENTS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file.

    Attributes:
        shape: as in torch, slowest dimension first.
        kind: how its rows are quantised.
        offset: of its first byte in the file.
        num_bytes: its length in the file.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufContainer:
    """A GGUF file's metadata (arrays of strings, such as the vocabulary, are left out) and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised to float32.

        Raises:
            CheckpointError: the file is shorter than it says, or holds a format that ``gguf`` cannot dequantise.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        value = torch.empty(tensor.shape, dtype=torch.float32)
        rows = value.view(-1, tensor.shape[-1])
        row_bytes, step = tensor.num_bytes // len(rows), max(1, _ELEMENTS_AT_ONCE // tensor.shape[-1])
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for part in rows.split(step):
                data = np.fromfile(file, dtype=np.uint8, count=len(part) * row_bytes)
                if len(data) != len(part) * row_bytes:
                    raise CheckpointError(f"{self.path} is truncated inside '{name}'")
                try:
                    part.copy_(torch.from_numpy(dequantize(data.reshape(len(part), row_bytes), tensor.kind)))
                except NotImplementedError as error:
                    raise CheckpointError(f"{self.path}: '{name}' is stored as {tensor.kind.name}: {error}") from error
        return value


def open_gguf(path: Path) -> GgufContainer:
    """Reads everything but the tensors' values.

    Raises:
        CheckpointError: it is no GGUF file, is truncated, or malformed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            container = _parse(path, _Cursor(mapped))
            size = len(mapped)
    except (ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    for name, tensor in container.tensors.items():
        if tensor.offset + tensor.num_bytes > size:
            raise CheckpointError(f"{path} is truncated: '{name}' ends behind the end of the file")
    return container


class _Cursor:
    """Walks over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        self.skip(num_bytes)
        return self._data[self.position - num_bytes : self.position]

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self.position:
            raise ValueError("it ends inside its header")
        self.position += num_bytes

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.position)
        self.position += struct.calcsize(code)
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._code(kind))
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
            return None
        code = self._code(kind)
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize(code))))

    @staticmethod
    def _code(kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        return _SCALARS[kind]


def _parse(path: Path, cursor: _Cursor) -> GgufContainer:
    from gguf.constants import GGUF_DEFAULT_ALIGNMENT

    if cursor.take(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, not one of {', '.join(map(str, _VERSIONS))}")
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    metadata = {cursor.text(): cursor.value() for _ in range(num_entries)}
    records = [_record(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: GgufTensor(shape, kind, start + offset, size) for name, shape, kind, offset, size in records}
    return GgufContainer(path, metadata, tensors)


def _record(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    """One row of the tensor table: name, shape, type, offset into the data, bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    name, num_dimensions = cursor.text(), cursor.number("I")
    shape = tuple(reversed([cursor.number("Q") for _ in range(num_dimensions)]))
    kind = GGMLQuantizationType(cursor.number("I"))
    if not shape or 0 in shape:
        raise ValueError(f"'{name}' has the empty shape {list(shape)}")
    size = 1
    for extent in quant_shape_to_byte_shape(shape, kind):
        size *= extent
    return name, shape, kind, cursor.number("Q"), size
