"""How the values of a GGUF file are stored: by name, which tensors in which type, and llama.cpp's own quantiser.

The types of one block a scale (Q8_0, Q4_0 …) are made here, by the ``gguf`` package; those of llama.cpp's K family only
by llama.cpp itself, from a file of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambify.errors import InvalidOptionError, UnsupportedError, did_you_mean
from mambify.export.gguf import llama_cpp
from mambify.export.gguf.tensors import GgufTensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

AUTO = "auto"
#: names that are made here → (type of the matrices, llama.cpp's file type), both by gguf's name
_HERE = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
#: names that llama.cpp's quantiser makes → its file type
_BY_LLAMA_CPP = {
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q5_k_s": "MOSTLY_Q5_K_S",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "q4_k_s": "MOSTLY_Q4_K_S",
    "q3_k_m": "MOSTLY_Q3_K_M",
    "q2_k": "MOSTLY_Q2_K",
}
_SHORT = {f"q{bits}_k": f"q{bits}_k_m" for bits in (3, 4, 5)}
_OF_MODEL = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
#: what may be asked for, the default first
DTYPES = (AUTO, *_HERE, *_BY_LLAMA_CPP, *_SHORT)
#: tables of a whole vocabulary keep eight bits where the rest has fewer, for every token passes them
_TABLES = ("token_embd.weight", "output.weight")
_FEWER_THAN_EIGHT_BITS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True)
class Storage:
    """A way to store values.

    Attributes:
        name: what was asked for, ``auto`` and short names resolved.
        kind: gguf's type of the matrices as they are written here.
        file_type: llama.cpp's number of the finished file.
        quantiser: makes the finished file of the one that is written here, where llama.cpp has to.
    """

    name: str
    kind: GGMLQuantizationType
    file_type: int
    quantiser: Callable[[Path, Path], None] | None = None

    @property
    def quantised(self) -> bool:
        """Whether blocks of values share a scale."""
        return self.name not in _OF_MODEL.values()


def storage(name: str, model_dtype: str) -> Storage:
    """The way called ``name``; ``auto`` stores what the model has.

    Raises:
        InvalidOptionError: there is no such way.
        MissingDependencyError: llama.cpp has to quantise, and is not installed.
    """
    from gguf import GGMLQuantizationType, LlamaFileType

    if name not in DTYPES:
        raise InvalidOptionError(f"GGUF has no dtype '{name}': {did_you_mean(name, DTYPES)}")
    if name == AUTO and model_dtype not in _OF_MODEL:
        raise InvalidOptionError(f"GGUF does not store a model of {model_dtype} as it is: choose a dtype, as f32")
    name = _OF_MODEL[model_dtype] if name == AUTO else _SHORT.get(name, name)
    if name in _HERE:
        kind, file_type = _HERE[name]
        return Storage(name, GGMLQuantizationType[kind], LlamaFileType[file_type].value)
    number = LlamaFileType[_BY_LLAMA_CPP[name]].value
    library = llama_cpp.require_llama_cpp(f"'{name}' is made by llama.cpp's own quantiser and")

    def quantiser(source: Path, target: Path) -> None:
        llama_cpp.quantise(library, source, target, number)

    return Storage(name, GGMLQuantizationType.F32, number, quantiser)


def kind_of(tensor: GgufTensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """How one tensor is stored in a file of ``wanted``: float16 where its rows do not fill whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.exact:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType.Q8_0 if tensor.name in _TABLES and wanted.name in _FEWER_THAN_EIGHT_BITS else wanted
    values_of_block, _ = GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % values_of_block == 0 else GGMLQuantizationType.F16


def stored(tensor: GgufTensor, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """The values of ``tensor`` as bytes of the file.

    Raises:
        UnsupportedError: a value is too large for float16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.value().numpy()
    if kind == GGMLQuantizationType.F32:
        return values
    if kind == GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise UnsupportedError(f"'{tensor.name}' has values that float16 cannot hold: choose bf16 or f32")
    quantised: npt.NDArray[Any] = quantize(values, kind)
    return quantised
