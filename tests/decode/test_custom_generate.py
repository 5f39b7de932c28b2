"""transformers' own interface over the engine: the same answers as ``model.generate`` without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria, TopPLogitsWarper
from transformers.generation import GenerateDecoderOnlyOutput

import mambify
from mambify.errors import UnsupportedError
from mambify.families.load import LoadedModel, require_tokenizer
from mambify.model import HybridForCausalLM

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ours(model: HybridForCausalLM, *inputs: Any, **settings: Any) -> Any:
    return model.generate(*inputs, custom_generate=mambify.custom_generate, **settings)


@pytest.mark.parametrize("draft", [None, "lookup", "itself"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_what_transformers_generates(
    hybrid: HybridForCausalLM, padded: tuple[Tensor, Tensor], draft: str | None, penalty: float
) -> None:
    """Padded rows: transformers counts a penalised padding token as part of the prompt, so here none is left."""
    ids_BT, mask_BT = padded
    if penalty != 1.0:
        ids_BT, mask_BT = ids_BT[:, 3:], None
    settings = GREEDY | {"attention_mask": mask_BT, "repetition_penalty": penalty}
    chosen: Any = hybrid if draft == "itself" else draft
    assert torch.equal(ours(hybrid, ids_BT, draft=chosen, **settings), hybrid.generate(ids_BT, **settings))


@pytest.mark.parametrize("number", [2, (1, 3), "auto"])
@pytest.mark.parametrize("draft", ["cut:1", "lookup"])
def test_any_draft_and_any_number_of_tokens(hybrid: HybridForCausalLM, draft: str, number: Any) -> None:
    ids_BT = torch.tensor([[5, 6, 7], [9, 9, 9]])
    found = ours(hybrid, ids_BT, draft=draft, num_draft_tokens=number, **GREEDY)
    assert torch.equal(found, hybrid.generate(ids_BT, **GREEDY))


def test_end_tokens_and_padding(hybrid: HybridForCausalLM) -> None:
    ids_BT = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(2))
    free = hybrid.generate(ids_BT, **GREEDY)[:, 5:]
    settings = GREEDY | {"eos_token_id": int(free[0, 3]), "max_new_tokens": 20}
    assert torch.equal(ours(hybrid, ids_BT, draft="lookup", **settings), hybrid.generate(ids_BT, **settings))


def test_sampling_is_what_the_config_says(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    chosen = {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 3} | chosen
    found = ours(hybrid, ids_1T, seed=[3, 4, 5], **settings)
    own = mambify.generate(hybrid, ids_1T.expand(3, -1), max_new_tokens=16, seed=[3, 4, 5], eos_token_id=[], **chosen)
    assert torch.equal(found, own)
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_a_dictionary_where_one_is_asked_for(hybrid: HybridForCausalLM) -> None:
    found = ours(hybrid, torch.tensor([[5, 6]]), return_dict_in_generate=True, **GREEDY)
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert found.sequences.shape == (1, 18)


def test_criteria_are_asked_after_every_token(hybrid: HybridForCausalLM) -> None:
    class Fifth:
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    ids_BT = torch.tensor([[5, 6, 7], [7, 8, 9]])
    settings = GREEDY | {"stopping_criteria": StoppingCriteriaList([Fifth()])}
    found = ours(hybrid, ids_BT, draft=hybrid, **settings)
    assert found.shape == (2, 8)
    assert torch.equal(found, hybrid.generate(ids_BT, **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor has no counterpart"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"bad_words_ids": [[4]]}, "no counterpart"),
        ({"do_sample": True, "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5)]), "top_k": 3},
         "TopKLogitsWarper comes twice, or later"),
    ],
)  # fmt: skip
def test_what_it_does_not_do_is_refused(hybrid: HybridForCausalLM, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        ours(hybrid, torch.tensor([[5, 6, 7]]), draft="lookup", **(GREEDY | settings))


def test_a_filled_cache_is_refused(hybrid: HybridForCausalLM) -> None:
    ids_1T = torch.tensor([[5, 6, 7]])
    cache = hybrid(ids_1T, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="past_key_values holds tokens"):
        ours(hybrid, torch.tensor([[5, 6, 7, 8]]), past_key_values=cache, **GREEDY)


def test_the_real_teacher_stops_at_a_string(smollm2: LoadedModel) -> None:
    tokenizer, model = require_tokenizer(smollm2), smollm2.model
    ids_1T = torch.tensor([tokenizer.encode("One, two, three, four,")])
    settings = GREEDY | {"stopping_criteria": StoppingCriteriaList([StopStringCriteria(tokenizer, ["seven"])])}
    found = ours(model, ids_1T, draft="lookup", **settings)
    assert tokenizer.decode(found[0]).endswith("seven")
    assert torch.equal(found, model.generate(ids_1T, **settings))
