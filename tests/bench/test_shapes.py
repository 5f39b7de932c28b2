"""Models of named sizes: the sizes are those of the models they are named after, the weights are random."""

from __future__ import annotations

import pytest
import torch

from mambify.bench.shapes import SHAPES, config_of_shape, model_of_shape
from mambify.errors import InvalidOptionError
from mambify.families.load import empty_model

#: parameters of the published models, tied embeddings counted once
PUBLISHED = {
    "135M": 134_515_008,
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "mamba-130m": 129_135_360,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_as_many_parameters_as_the_models_they_are_named_after(name: str) -> None:
    model = empty_model(config_of_shape(name))
    if model.config.tie_word_embeddings:
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_model_of_a_shape_runs_in_the_dtype_asked_for(mixer: str) -> None:
    model = model_of_shape("tiny", "cpu", torch.bfloat16, seed=3, attention=0.5, mixer=mixer)
    assert model.config.layer_mixers == [mixer, "attention"] * 2
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    ids = torch.arange(6)[None]
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all() and logits.std() > 0
    again = model_of_shape("tiny", "cpu", torch.bfloat16, seed=3, attention=0.5, mixer=mixer)
    assert torch.equal(again(input_ids=ids).logits, logits)


def test_a_shape_that_there_is_not_names_those_that_there_are() -> None:
    with pytest.raises(InvalidOptionError, match="no shape '8b'") as error:
        config_of_shape("8b")
    assert any(name in str(error.value) for name in SHAPES)
    with pytest.raises(InvalidOptionError, match="'mamba-7b' is pure Mamba"):
        config_of_shape("mamba-7b", attention=0.5)


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_pure_mamba_shapes(name: str) -> None:
    model = model_of_shape(name, "cpu", torch.bfloat16, seed=0)
    assert not model.config.attention_layers and model.model.layers[0].mlp is None
    logits = model(input_ids=torch.arange(6)[None]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and logits.std() > 0
