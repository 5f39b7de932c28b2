"""Loads a teacher or a mambify model, tensor by tensor, into HybridForCausalLM; saves one with its tokenizer.

Memory stays near one copy of the model: the module is built without storage and each weight is put in as it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from mambify.config import HybridConfig
from mambify.errors import CheckpointError, InvalidOptionError, OutputWriteError, UnknownSourceError
from mambify.families import safetensors
from mambify.families.checkpoint import Checkpoint, open_checkpoint
from mambify.families.gguf import GgufFile
from mambify.families.mixers_only import completed
from mambify.families.pretokenizers import pre_tokenizer
from mambify.families.sources import Source, resolve
from mambify.io import atomic_directory
from mambify.machine import require_device
from mambify.model import HybridForCausalLM, HybridRotaryEmbedding
from mambify.provenance import Provenance

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: ``None`` for a directory that has none.
        source: what the user called it.
        family: the teacher's architecture.
    """

    model: HybridForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    family: str


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    with_tokenizer: bool = True,
) -> LoadedModel:
    """Loads ``source``: a Hub id, a directory (Hugging Face's or ours), a ``.gguf`` file, or an alias.

    A directory that holds mixers only is completed by its base, each weight of which is read once, into its place.

    Args:
        dtype: ``"auto"`` keeps the checkpoint's own (float32 for GGUF).
        device: where the weights go, each as it is read.
        with_tokenizer: whether to read the tokenizer too, which takes seconds from a GGUF file.

    Raises:
        UnknownSourceError, UnsupportedError, CheckpointError: see :mod:`mambify.errors`.
        InvalidOptionError: no such dtype, or no such device on this machine.
    """
    wanted, device = as_dtype(dtype), require_device(device)
    where = resolve(source)
    checkpoint = _whole(where)
    tokenizer = load_tokenizer(where) if with_tokenizer else None  # first: what it needs for a moment is free again
    config = checkpoint.config
    model = build(config, checkpoint.weights(), dtype=wanted or checkpoint.dtype, device=device, source=where.name)
    model.generation_config = _generation_config(where, config)
    model.provenance = checkpoint.provenance
    return LoadedModel(model, tokenizer, where.name, config.teacher_family)


def load_config(source: str | Path) -> HybridConfig:
    """Only the configuration of ``source``: no weights are read.

    Raises:
        UnknownSourceError, UnsupportedError: as :func:`load`.
    """
    return _whole(resolve(source)).config


def _whole(where: Source) -> Checkpoint:
    """The checkpoint of a whole model, be it that its files hold mixers only."""
    checkpoint = open_checkpoint(where)
    return checkpoint if checkpoint.config.base is None else completed(where, checkpoint)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; ``None`` for ``"auto"``."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise InvalidOptionError(f"unknown dtype '{dtype}': choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def empty_model(config: HybridConfig) -> HybridForCausalLM:
    """A model without storage (every parameter on ``meta``), in evaluation mode."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    model.model.rotary_emb = HybridRotaryEmbedding(config=config)
    model.eval()
    return model


def build(
    config: HybridConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    source: str,
) -> HybridForCausalLM:
    """Fills an empty model from a stream of (our name, tensor).

    Raises:
        CheckpointError: a weight is missing, unknown, of a wrong shape, or not finite.
    """
    model = empty_model(config)
    config.dtype = dtype
    wanted = set(model.state_dict())
    tied = config.tie_word_embeddings
    for name, tensor in weights:
        if tied and name == "lm_head.weight":
            continue
        if name not in wanted:
            raise CheckpointError(f"{source}: weight '{name}' has no place in this architecture")
        set_parameter(model, name, tensor, dtype=dtype, device=device, source=source)
        wanted.discard(name)
    if tied:
        model.tie_weights()
        wanted.discard("lm_head.weight")
    if wanted:
        raise CheckpointError(f"{source}: {len(wanted)} weights are missing, first '{sorted(wanted)[0]}'")
    model.to(device)
    return model


def set_parameter(
    model: nn.Module, name: str, tensor: Tensor, *, dtype: torch.dtype, device: torch.device | str, source: str
) -> None:
    """Puts one weight in the place of a parameter without storage; state-space parameters stay float32."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    place = getattr(owner, leaf)
    is_buffer = leaf in owner._buffers
    if place.shape != tensor.shape:
        raise CheckpointError(
            f"{source}: '{name}' has shape {list(tensor.shape)}, the configuration says {list(place.shape)}"
        )
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():  # isfinite of all would copy the tensor
        raise CheckpointError(f"{source}: '{name}' holds NaN or infinite values")
    if is_buffer:  # which words a trimmed head knows
        setattr(owner, leaf, tensor.to(device=device, dtype=place.dtype))
        return
    tensor = tensor.to(device=device, dtype=dtype_of(model, name, dtype))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=True))


def dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What the parameter ``name`` is kept in, in a model of ``dtype``: float32 where a mixer insists on it."""
    owner_name, _, leaf = name.rpartition(".")
    insists = leaf in getattr(model.get_submodule(owner_name), "float32_parameters", ())
    return torch.float32 if insists else dtype


def load_tokenizer(source: Source | str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or ``None`` where there is none."""
    where = source if isinstance(source, Source) else resolve(source)
    if where.gguf is not None:
        file = GgufFile(where.directory / where.gguf)
        if not file.has_tokenizer:
            return None
        tokenizer = AutoTokenizer.from_pretrained(where.directory, gguf_file=where.gguf)
        for name, token_id in file.special_tokens().items():  # some versions of transformers mix these up
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
        cutting = pre_tokenizer(file.pre_tokenizer)
        if cutting is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = cutting
        return tokenizer
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((where.directory / name).is_file() for name in names):
        return None
    return AutoTokenizer.from_pretrained(where.directory)


def require_tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that needs one.

    Raises:
        UnknownSourceError: it has none.
    """
    if loaded.tokenizer is None:
        raise UnknownSourceError(f"{loaded.source} has no tokenizer, and this needs one")
    return loaded.tokenizer


def _generation_config(where: Source, config: HybridConfig) -> GenerationConfig:
    if where.gguf is None and (where.directory / "generation_config.json").is_file():
        stored = GenerationConfig.from_pretrained(where.directory)
        if not stored.do_sample:  # then transformers ignores these, and refuses to save a model that has them
            for name in _SAMPLING:
                setattr(stored, name, None)
        return stored
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def save(
    model: HybridForCausalLM,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves model, tokenizer, model card and checksums as one directory, whole or not at all.

    Args:
        provenance: how the model came to be, for its card; what it was loaded with by default.

    Raises:
        OutputExistsError: the path is taken.
        OutputWriteError: the disk refused; what stood there is intact.
    """
    if provenance is not None:
        model.provenance = provenance
    with atomic_directory(path, overwrite=overwrite) as directory:
        try:
            model.save_pretrained(directory)
        except SafetensorError as error:
            raise OutputWriteError(f"cannot write the weights of {path}: {error}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        safetensors.record_checksums(directory)
    return Path(path)
