"""Replaces attention layers by Mamba mixers that start from their weights; everything else is kept by reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mambify.conversion.plan import ConversionPlan, plan
from mambify.families.load import LoadedModel, load
from mambify.mixers import MIXERS, AttentionMixer, AttentionWeights, Mixer
from mambify.model import HybridBlock, HybridForCausalLM


def convert(
    teacher: str | Path | LoadedModel | HybridForCausalLM,
    *,
    mixer: str = "mamba2",
    attention: float = 0.5,
    attention_layers: Sequence[int] | None = None,
    init: str = "identity",
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> HybridForCausalLM:
    """Turns a pretrained Transformer into a hybrid Mamba model (arXiv 2408.15237, section 2).

    Args:
        teacher: Hub id, directory, ``.gguf`` file, ``smollm2``, or a model in memory. A model in memory stays usable:
            the student shares its kept modules (embeddings, norms, MLPs, head, kept attention) by reference.
        mixer: ``mamba2`` or ``mamba1``.
        attention: share of the layers that keep attention.
        attention_layers: the layers that keep attention, instead of a share.
        init: name of the initialisation (``paper``, ``identity``).
        seed: of what is drawn at random.
        dtype, device: as in :func:`mambify.families.load.load`, where a teacher is loaded.

    Returns:
        The student, in evaluation mode.

    Raises:
        UsageError: see :func:`mambify.conversion.plan.plan` and :func:`mambify.families.load.load`.
    """
    if isinstance(teacher, LoadedModel):
        teacher = teacher.model
    loaded_here = not isinstance(teacher, HybridForCausalLM)
    if not isinstance(teacher, HybridForCausalLM):
        teacher = load(teacher, dtype=dtype, device=device, with_tokenizer=False).model
    planned = plan(teacher.config, mixer=mixer, attention=attention, attention_layers=attention_layers, init=init)
    return apply_plan(teacher, planned, seed=seed, release=loaded_here)


def apply_plan(
    teacher: HybridForCausalLM, planned: ConversionPlan, *, seed: int = 0, release: bool = False
) -> HybridForCausalLM:
    """Builds the student of ``planned`` around the teacher's kept weights; only the new mixers are allocated.

    Blocks are the student's own; the norms, MLPs, projections, embeddings and head inside them are the teacher's
    modules, by reference.

    Args:
        release: give up the teacher, which nobody else holds: each attention layer is freed once it is replaced.
    """
    with torch.device("meta"):
        student = HybridForCausalLM(planned.student)
    student.model.embed_tokens = teacher.model.embed_tokens
    student.model.norm = teacher.model.norm
    student.model.rotary_emb = teacher.model.rotary_emb
    student.lm_head = teacher.lm_head
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        assert isinstance(ours, HybridBlock) and isinstance(theirs, HybridBlock)
        _share_children(ours, theirs, own=("mixer",))
        if ours.layer_idx in planned.converted:
            assert isinstance(theirs.mixer, AttentionMixer)
            ours.mixer = _new_mixer(theirs.mixer, planned, ours.layer_idx, seed=seed)
            if release:
                del theirs.mixer
        elif isinstance(theirs.mixer, AttentionMixer):
            _share_children(ours.mixer, theirs.mixer, own=("attend",))
        else:
            ours.mixer = theirs.mixer
    student.generation_config = teacher.generation_config
    student.eval()
    return student


def _share_children(ours: nn.Module, theirs: nn.Module, *, own: tuple[str, ...]) -> None:
    """Puts the submodules of ``theirs`` into ``ours`` by reference, except those named in ``own``."""
    for name, child in theirs.named_children():
        if name not in own:
            setattr(ours, name, child)


def _new_mixer(attention: AttentionMixer, planned: ConversionPlan, layer_idx: int, *, seed: int) -> Mixer:
    """The mixer that takes the place of ``attention``, started from its weights, in their dtype and place."""
    mixers = planned.student.layer_mixers
    assert mixers is not None
    weights = attention.weights()
    with torch.device("meta"):  # every parameter is set below: nothing to draw, nothing taken from the global generator
        mixer = MIXERS[mixers[layer_idx]](planned.student, layer_idx)
    mixer.to_empty(device="cpu")
    mixer.init_from_attention(
        AttentionWeights(*(None if w is None else w.detach().float().cpu() for w in weights)),  # type: ignore[arg-type]
        init=planned.init,
        generator=torch.Generator().manual_seed(seed * 1_000_003 + layer_idx),
    )
    return mixer.to(device=weights.q.device, dtype=weights.q.dtype)
