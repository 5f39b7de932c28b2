"""Replaces attention layers by Mamba mixers that start from their weights; everything else is kept by reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mambify.conversion.init import INITIALISATIONS, fit_to_attention, needs_text
from mambify.conversion.plan import ConversionPlan, plan
from mambify.conversion.sample import AttentionSample, sample_attention
from mambify.errors import InvalidOptionError
from mambify.families.load import LoadedModel, load
from mambify.mixers import MIXERS, AttentionMixer, AttentionWeights, Mixer, RecurrentMixer
from mambify.model import HybridBlock, HybridForCausalLM

_ROWS = 8


def convert(
    teacher: str | Path | LoadedModel | HybridForCausalLM,
    *,
    mixer: str = "mamba2",
    attention: float = 0.5,
    attention_layers: Sequence[int] | None = None,
    init: str = "identity",
    calibration: Tensor | None = None,
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
        init: name of the initialisation, a row of :data:`mambify.conversion.init.INITIALISATIONS`.
        calibration: token ids ``[N, T]`` for an initialisation that is measured on text; a few thousand tokens, which
            should not be evaluated on.
        seed: of what is drawn at random.
        dtype, device: as in :func:`mambify.families.load.load`, where a teacher is loaded.

    Returns:
        The student, in evaluation mode.

    Raises:
        UsageError: see :func:`mambify.conversion.plan.plan` and :func:`mambify.families.load.load`.
        InvalidOptionError: ``init`` is measured on text, and there is none.
    """
    if init in INITIALISATIONS:
        require_text(init, given=calibration is not None)  # before a teacher is loaded
    if isinstance(teacher, LoadedModel):
        teacher = teacher.model
    loaded_here = not isinstance(teacher, HybridForCausalLM)
    if not isinstance(teacher, HybridForCausalLM):
        teacher = load(teacher, dtype=dtype, device=device, with_tokenizer=False).model
    planned = plan(teacher.config, mixer=mixer, attention=attention, attention_layers=attention_layers, init=init)
    return apply_plan(teacher, planned, seed=seed, release=loaded_here, calibration=calibration)


def apply_plan(
    teacher: HybridForCausalLM,
    planned: ConversionPlan,
    *,
    seed: int = 0,
    release: bool = False,
    calibration: Tensor | None = None,
    measured_on: HybridForCausalLM | None = None,
) -> HybridForCausalLM:
    """Builds the student of ``planned`` around the teacher's kept weights; only the new mixers are allocated.

    Blocks are the student's own; the norms, MLPs, projections, embeddings and head inside them are the teacher's
    modules, by reference.

    Args:
        release: give up the teacher, which nobody else holds: each attention layer is freed once it is replaced.
        calibration: token ids ``[N, T]`` for an initialisation that is measured on text. It goes up through the layers
            as they are replaced, so beside the teacher only its hidden states are held.
        measured_on: the model whose hidden states the attention layers are measured on; the teacher by default. (A
            hybrid that is converted further has other ones than its own teacher.)

    Raises:
        InvalidOptionError: the initialisation is measured on text, and there is none.
    """
    require_text(planned.init, given=calibration is not None)
    ascent = None
    if calibration is not None and needs_text(planned.init):
        ascent = _Ascent(measured_on or teacher, calibration, planned.converted)
    with torch.device("meta"):
        student = HybridForCausalLM(planned.student)
    student.model.embed_tokens = teacher.model.embed_tokens
    student.model.feature_input = teacher.model.feature_input
    student.model.norm = teacher.model.norm
    student.model.rotary_emb = teacher.model.rotary_emb
    student.lm_head = teacher.lm_head
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        assert isinstance(ours, HybridBlock) and isinstance(theirs, HybridBlock)
        _share_children(ours, theirs, own=("mixer",))
        if ours.layer_idx in planned.converted:
            assert isinstance(theirs.mixer, AttentionMixer)
            sample = None if ascent is None else ascent.to(ours.layer_idx)
            ours.mixer = _new_mixer(theirs.mixer, planned, ours.layer_idx, sample, seed=seed)
            if release:
                del theirs.mixer
        elif isinstance(theirs.mixer, AttentionMixer):
            _share_children(ours.mixer, theirs.mixer, own=("attend",))
        else:
            ours.mixer = theirs.mixer
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.eval()
    return student


def require_text(init: str, *, given: bool) -> None:
    """Raises InvalidOptionError where ``init`` is measured on text and none is given."""
    if needs_text(init) and not given:
        raise InvalidOptionError(
            f"initialisation '{init}' is measured on text: give some (--calibration-text FILE, or calibration=ids), "
            "or choose identity or paper"
        )


class _Ascent:
    """Calibration text on its way up through a model, one converted layer at a time."""

    def __init__(self, model: HybridForCausalLM, ids_NT: Tensor, layers: Sequence[int]) -> None:
        self.model = model
        self.batches = [model.model.mixer_traces(ids, layers) for ids in ids_NT.to(model.device).split(_ROWS)]
        embedded_1TD = torch.empty(1, ids_NT.shape[1], 1, device=model.device)
        self.contexts, _ = model.model.layer_contexts(embedded_1TD)

    def to(self, layer_idx: int) -> AttentionSample:
        """Goes on to this layer, the next of those asked for, and looks at its attention there."""
        traces = [next(batch) for batch in self.batches]
        assert all(trace.layer_idx == layer_idx for trace in traces)
        block = self.model.model.layers[layer_idx]
        assert isinstance(block.mixer, AttentionMixer)
        return sample_attention(block.mixer, traces, self.contexts[layer_idx])


def _share_children(ours: nn.Module, theirs: nn.Module, *, own: tuple[str, ...]) -> None:
    """Puts the submodules of ``theirs`` into ``ours`` by reference, except those named in ``own``."""
    for name, child in theirs.named_children():
        if name not in own:
            setattr(ours, name, child)


def _new_mixer(
    attention: AttentionMixer, planned: ConversionPlan, layer_idx: int, sample: AttentionSample | None, *, seed: int
) -> Mixer:
    """The mixer that takes the place of ``attention``, started from its weights, in their dtype and place."""
    mixers = planned.student.layer_mixers
    assert mixers is not None
    weights = attention.weights()
    with torch.device("meta"):  # every parameter is set below: nothing to draw, nothing taken from the global generator
        mixer = MIXERS[mixers[layer_idx]](planned.student, layer_idx)
    mixer.to_empty(device="cpu")
    mixer.init_from_attention(
        AttentionWeights(*(None if w is None else w.detach().float().cpu() for w in weights)),  # type: ignore[arg-type]
        start=INITIALISATIONS[planned.init].start,
        generator=torch.Generator().manual_seed(seed * 1_000_003 + layer_idx),
    )
    if sample is not None:
        assert isinstance(mixer, RecurrentMixer)
        fit_to_attention(mixer.to(weights.q.device), planned.init, sample)
    return mixer.to(device=weights.q.device, dtype=weights.q.dtype)
