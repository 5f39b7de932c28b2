"""Runs a GGUF file with llama.cpp, through llama-cpp-python: logits, greedy tokens, and how long each part takes.

The bindings' own ``Llama`` object crops caches as only attention can be cropped; this speaks to the C interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from mambify.errors import CheckpointError, MambifyError
from mambify.export.gguf.llama_cpp import last_errors, require_llama_cpp

Logits = npt.NDArray[np.float32]


class LlamaCpp:
    """One GGUF file in llama.cpp on the CPU, with one sequence. Close it, or use it in ``with``.

    Args:
        path: the file.
        context_length: tokens that fit.
        threads: of the CPU.
        batch: tokens that a prompt is read in at a time.
        exact: keys and values in float32 and plain attention, to compare logits; llama.cpp's own defaults otherwise.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        CheckpointError: llama.cpp does not take the file, or has no memory for its context.
    """

    def __init__(
        self, path: str | Path, *, context_length: int, threads: int = 1, batch: int = 512, exact: bool = True
    ) -> None:
        self._lib = lib = require_llama_cpp("this")
        self._batch_tokens = batch
        model_parameters = lib.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), model_parameters)
        if not self._model:
            raise CheckpointError(f"llama.cpp does not load {path}: {last_errors()}")
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context_length, batch, batch
        parameters.n_threads = parameters.n_threads_batch = threads
        if exact:
            parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            lib.llama_model_free(self._model)
            raise CheckpointError(f"llama.cpp makes no context of {context_length} tokens for {path}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def reset(self) -> None:
        """Forgets the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._seen = 0

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        """The tokens of ``text``; ``special`` reads the text of special tokens as these."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), add_special, special)
        return list(room[:count])

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Reads on with ``tokens``; their logits ``[T, V]``."""
        return np.concatenate([self._decode(part, every=True) for part in self._parts(tokens)])

    def read(self, tokens: Sequence[int]) -> Logits:
        """Reads on with ``tokens``; the logits after the last, ``[V]``."""
        for part in self._parts(tokens):
            last = self._decode(part, every=False)
        after_V: Logits = last[-1]
        return after_V

    def greedy(self, tokens: Sequence[int], max_new_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        """The likeliest tokens after ``tokens``, up to one of ``stop``, which is left out."""
        new: list[int] = []
        logits = self.read(tokens)
        while len(new) < max_new_tokens and (token := int(logits.argmax())) not in stop:
            new.append(token)
            logits = self.read([token])
        return new

    def _parts(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        return [tokens[first : first + self._batch_tokens] for first in range(0, len(tokens), self._batch_tokens)]

    def _decode(self, tokens: Sequence[int], *, every: bool) -> Logits:
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = self._seen + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = every or index == len(tokens) - 1
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise MambifyError(f"llama.cpp stopped with status {status} after {self._seen} tokens: {last_errors()}")
        self._seen += len(tokens)
        count = len(tokens) if every else 1
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self.vocab_size)).copy()
