"""Writes a student as one GGUF file for llama.cpp and what is built on it: checks, metadata, then tensor by tensor."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mambify.config import HybridConfig
from mambify.export.gguf.checks import require_no_output_bias, require_representable
from mambify.export.gguf.layout import CUDA_STATE_SIZES, MambaLayout, mamba_layout, needs_idle_block
from mambify.export.gguf.metadata import architecture, write_origin, write_sizes
from mambify.export.gguf.modelfile import modelfile as render_modelfile
from mambify.export.gguf.quantise import AUTO, Storage, kind_of, storage, stored
from mambify.export.gguf.tensors import gguf_tensors
from mambify.export.gguf.tokenizer import Vocabulary, vocabulary
from mambify.export.result import Exported
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.io import atomic_file, atomic_write_text, require_new_file
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

#: options of this format alone
OPTIONS = ("modelfile", "pad_state")


def write(
    loaded: LoadedModel, out: Path, *, dtype: str, overwrite: bool, modelfile: bool = False, pad_state: bool = False
) -> Exported:
    """:func:`export_gguf` of a model that was loaded with its tokenizer.

    Raises:
        UnknownSourceError: it has none, and llama.cpp needs one.
    """
    return export_gguf(
        loaded.model,
        require_tokenizer(loaded),
        out,
        dtype=dtype,
        modelfile=modelfile,
        pad_state=pad_state,
        overwrite=overwrite,
    )


@torch.no_grad()
def export_gguf(
    student: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    dtype: str = AUTO,
    pad_state: bool = False,
    modelfile: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Writes ``student`` as a GGUF file of llama.cpp's architecture ``granitehybrid``, whole or not at all.

    A model without a converted layer becomes ``llama``. Beside the model there is one tensor in memory at a time.

    Args:
        tokenizer: goes into the file, with its chat template.
        dtype: of the matrices: ``auto`` (as the model has them), ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0`` …;
            norms, biases, convolutions and the state-space parameters stay float32. ``q4_k_m`` and the rest of
            that family are made by llama.cpp's own quantiser.
        pad_state: fill the states up to a size that llama.cpp's CUDA kernel takes.
        modelfile: write a Modelfile for Ollama beside it, ``PATH`` with the ending ``.Modelfile``.

    Raises:
        UnsupportedError: llama.cpp cannot compute what this model does, or cannot carry its tokenizer.
        InvalidOptionError: there is no such dtype.
        MissingDependencyError: llama.cpp has to quantise, and is not installed.
        OutputExistsError: the path is taken.
        OutputWriteError: the disk refused; what stood there is intact.
    """
    path = require_new_file(path, overwrite=overwrite)
    beside = require_new_file(path.with_suffix(".Modelfile"), overwrite=overwrite) if modelfile else None
    config = student.config
    require_representable(config)
    require_no_output_bias(student)
    layout = mamba_layout(config, pad_state=pad_state) if config.converted_layers else None
    how = storage(dtype, str(student.dtype).removeprefix("torch."))
    words = vocabulary(tokenizer, config.vocab_size)
    with atomic_file(path, overwrite=overwrite) as temporary:
        if how.quantiser is None:
            halved = _write(temporary, student, layout, words, how)
        else:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
                unquantised = Path(directory) / "f32.gguf"
                halved = _write(unquantised, student, layout, words, how)
                how.quantiser(unquantised, temporary)
    if beside is not None:
        atomic_write_text(beside, render_modelfile(path, tokenizer, config.max_position_embeddings))
    return Exported(
        path=path,
        dtype=how.name,
        weight_bytes=path.stat().st_size,
        notes=tuple(_notes(config, layout, halved, how, beside)),
    )


def _write(
    path: Path, student: HybridForCausalLM, layout: MambaLayout | None, words: Vocabulary, how: Storage
) -> list[str]:
    """Writes the file; returns the names of the matrices whose rows do not fill a quantised type's blocks."""
    from gguf import GGUFWriter

    config = student.config
    writer = GGUFWriter(path, architecture(config))
    write_origin(writer, config, file_type=how.file_type, quantised=how.quantised)
    write_sizes(writer, student, layout)
    words.write(writer)
    tensors = [(tensor, kind_of(tensor, how.kind)) for tensor in gguf_tensors(student, layout)]
    for tensor, kind in tensors:
        shape = tensor.shape
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), _num_bytes(shape, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in tensors:
            writer.write_tensor_data(stored(tensor, kind))
    finally:
        writer.close()
    return [tensor.name for tensor, kind in tensors if how.quantised and kind.name == "F16"]


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // values * size


def _notes(
    config: HybridConfig, layout: MambaLayout | None, halved: list[str], how: Storage, beside: Path | None
) -> Iterator[str]:
    if beside is not None:
        yield f"For Ollama: ollama create NAME -f {beside}"
    if how.quantiser is not None and (config.hidden_size % 256 or config.intermediate_size % 256):
        yield f"Rows that do not fill blocks of 256 are stored by llama.cpp in a larger type than {how.name}."
    if halved:
        yield f"{len(halved)} matrices are stored in f16, for their rows do not fill the blocks of {how.name}."
    if layout is None:
        return
    (our_weights, weights), (our_state, state) = layout.weights, layout.state_elements
    our_operations, operations = layout.operations
    yield (
        f"llama.cpp gives a Mamba2 layer {layout.inner} channels where this model has "
        f"{layout.num_heads * layout.head_dim}: a mixer grows to {weights / our_weights:.2f} times the weights and "
        f"{operations / our_operations:.2f} times the arithmetic, a state to {state / our_state:.2f} times the size. "
        "Outputs are the same."
    )
    if needs_idle_block(config):
        yield "A block that adds zero stands behind the last one: llama.cpp runs no hybrid without attention."
    if layout.state not in CUDA_STATE_SIZES:
        sizes = ", ".join(map(str, CUDA_STATE_SIZES))
        yield f"States of {layout.state}: llama.cpp's CUDA kernel takes {sizes}; for a GPU export with --pad-state."
