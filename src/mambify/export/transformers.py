"""A student as a stock GraniteMoeHybrid directory: transformers, vLLM and SGLang read it without this package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mambify.card import CARD, render_card
from mambify.config import ATTENTION
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.export.granite_config import MINIMUM_TRANSFORMERS, granite_config, granite_layout
from mambify.export.lint import lint, tensor_parallel_sizes
from mambify.export.result import Exported
from mambify.families.granite_layout import GraniteLayout
from mambify.families.load import LoadedModel, as_dtype
from mambify.families.safetensors import write_file
from mambify.io import atomic_directory, atomic_write_text, require_new, write_json
from mambify.model import HybridForCausalLM

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIONS = ("split_heads",)
SHARD_BYTES = 5_000_000_000
_USE = f"""The architecture is GraniteMoeHybrid without experts, which other tools know; nothing else has to be
installed, and no remote code is run.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # {MINIMUM_TRANSFORMERS} or newer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID")
```

```
vllm serve PATH_OR_HUB_ID --mamba-ssm-cache-dtype float32
python -m sglang.launch_server --model-path PATH_OR_HUB_ID
```

`mambify.load("PATH_OR_HUB_ID")` reads it back into the model that it was exported from."""
_FLOAT32 = ("A_log", "dt_bias", "D")


def write(loaded: LoadedModel, out: Path, *, dtype: str, overwrite: bool, split_heads: int | None = None) -> Exported:
    """:func:`export_transformers` of a model that was loaded with its tokenizer."""
    return export_transformers(
        loaded.model,
        out,
        tokenizer=loaded.tokenizer,
        dtype=dtype,
        split_heads=1 if split_heads is None else split_heads,
        overwrite=overwrite,
    )


def export_transformers(
    student: HybridForCausalLM,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    split_heads: int = 1,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Writes ``student`` as ``GraniteMoeHybridForCausalLM``: same logits, no remote code, whole or not at all.

    Beside the model there is one shard of weights in memory at a time.

    Args:
        tokenizer: is written beside the weights, with its chat template.
        dtype: of the weights; ``"auto"`` is the model's own. ``A_log``, ``dt_bias`` and ``D`` stay float32.
        split_heads: into how many heads of the stock mixer each of ours is cut; the model is the same one. The CUDA
            kernel of the package causal-conv1d takes mixers of a multiple of 8 heads only.
        shard_bytes: how large a weight file may become.

    Raises:
        UnsupportedError: the architecture cannot carry this model exactly.
        OutputExistsError: the path is taken.
        OutputWriteError: the disk refused; what stood there is intact.
    """
    if dtype not in DTYPES:
        raise InvalidOptionError(f"unknown dtype '{dtype}': {did_you_mean(dtype, DTYPES)}")
    config = student.config
    layout = granite_layout(config, split=split_heads)
    require_new(path, overwrite=overwrite)
    stored = as_dtype(dtype) or student.dtype
    stock = granite_config(config, layout, dtype=str(stored).removeprefix("torch."))
    sizes = tensor_parallel_sizes(stock)
    notes = (
        f"transformers has to be {MINIMUM_TRANSFORMERS} or newer: before, its mixer normed all heads at once.",
        f"Tensor parallel sizes: {', '.join(map(str, sizes))}.",
    )
    with atomic_directory(path, overwrite=overwrite) as directory:
        write_json(directory / "config.json", stock)
        weight_bytes = _write_shards(directory, _in_dtype(stock_weights(student, layout), stored), shard_bytes)
        student.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        card = render_card(config, student.provenance, use=_USE, limits=notes)
        atomic_write_text(directory / CARD, card)
        if student.provenance is not None:
            student.provenance.write(directory)
    return Exported(
        path=Path(path),
        dtype=stock["dtype"],
        weight_bytes=weight_bytes,
        findings=tuple(lint(stock)),
        notes=notes,
    )


@torch.no_grad()
def stock_weights(student: HybridForCausalLM, layout: GraniteLayout) -> Iterator[tuple[str, Tensor]]:
    """(stock name, tensor) of every weight, in the order of the layers; of tied ones the embedding only."""
    config, decoder = student.config, student.model
    yield "model.embed_tokens.weight", decoder.embed_tokens.weight
    for index, (layer, mixer) in enumerate(zip(decoder.layers, config.layer_mixers or (), strict=True)):
        weights = dict(layer.named_parameters())
        place, kind = f"model.layers.{index}", "self_attn" if mixer == ATTENTION else "mamba"
        fold = layout.fold_attention if mixer == ATTENTION else layout.fold_mamba2
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield f"{place}.{norm}", weights[norm]
        for own in (name for name in weights if name.startswith("mixer.")):
            for name, tensor in fold(own.removeprefix("mixer."), weights[own]):
                yield f"{place}.{kind}.{name}", tensor
        gate_up = torch.cat([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
        yield f"{place}.shared_mlp.input_linear.weight", gate_up
        yield f"{place}.shared_mlp.output_linear.weight", weights["mlp.down_proj.weight"]
    for index in range(config.num_hidden_layers, config.num_hidden_layers + layout.inert_layers):
        for name, tensor in layout.inert_layer(decoder.norm.weight, config.intermediate_size):
            yield f"model.layers.{index}.{name}", tensor
    yield "model.norm.weight", decoder.norm.weight
    if not config.tie_word_embeddings:
        yield "lm_head.weight", student.lm_head.weight


def _in_dtype(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        exact = torch.float32 if name.endswith(_FLOAT32) else dtype
        yield name, tensor.detach().to("cpu", exact).contiguous()


def _write_shards(directory: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> int:
    """Writes ``weights`` under transformers' file names, with the index where there are several; returns the bytes."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        write_file(directory / f"shard-{len(shards)}", pending)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return total
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{index}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total
