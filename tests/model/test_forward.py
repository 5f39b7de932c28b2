"""One forward pass of a hybrid: padded, packed, in parts, with gradients; what it returns when asked for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mambify.model
from mambify import HybridForCausalLM
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.mixers import AttentionMixer
from mambify.model import new_cache

Hybrid = Callable[..., HybridForCausalLM]

LAYERS = {
    "hybrid": ["mamba2", "attention", "mamba1", "attention"],
    "ends-recurrent": ["attention", "mamba2"],
    "mamba2": ["mamba2", "mamba2"],
    "mamba1": ["mamba1", "mamba1"],
    "attention": ["attention", "attention"],
}
SPECIAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding": {"sliding_window": 5},
    "everything": {
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": True,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
T = 20


@pytest.fixture(params=[(layers, "plain") for layers in LAYERS] + [("hybrid", "sliding"), ("hybrid", "everything")])
def model(request: pytest.FixtureRequest, tiny_hybrid: Hybrid) -> HybridForCausalLM:
    layers, special = request.param
    return tiny_hybrid(LAYERS[layers], **SPECIAL[special])


@pytest.fixture
def hybrid(tiny_hybrid: Hybrid) -> HybridForCausalLM:
    return tiny_hybrid()


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max() <= tolerance


@torch.no_grad()
def test_in_parts(model: HybridForCausalLM) -> None:
    ids = tokens()
    expected = model(ids).logits
    for splits in ([7], [1, 2, 3, 12], list(range(1, T)), [19]):
        cache, parts = None, []
        for start, end in zip([0, *splits], [*splits, T], strict=True):
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        close(torch.cat(parts, 1), expected)
        assert cache.get_seq_length() == T


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_left_padding(model: HybridForCausalLM, with_positions: bool) -> None:
    """RoPE sees differences of positions only, so padding shifts nothing even where no positions are given."""
    ids, mask = tokens(3), torch.ones(3, T, dtype=torch.long)
    for row, padding in enumerate((0, 3, 9)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0) if with_positions else None
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, padding in enumerate((0, 3, 9)):
        close(logits[row : row + 1, padding:], model(ids[row : row + 1, padding:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents(model: HybridForCausalLM, told_by: str, attention: str) -> None:
    model.set_attn_implementation(attention)
    lengths = [1, 6, 2, 11]
    documents = tokens(1, sum(lengths)).split(lengths, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    told = {"position_ids": positions} if told_by == "position_ids" else {"seq_idx": seq_idx}
    output = model(torch.cat(documents, 1), **told)
    assert output.past_key_values is None
    close(output.logits, torch.cat([model(document).logits for document in documents], 1))


@torch.no_grad()
def test_packed_rows_of_a_batch_differ(hybrid: HybridForCausalLM) -> None:
    ids = tokens(2, 12)
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    logits = hybrid(ids, position_ids=positions).logits
    close(logits[:1, 5:], hybrid(ids[:1, 5:]).logits)
    close(logits[1:], hybrid(ids[1:]).logits)


@torch.no_grad()
def test_documents_of_whole_rows_only(hybrid: HybridForCausalLM) -> None:
    seq_idx = torch.zeros(2, T, dtype=torch.long)
    for given in ({"attention_mask": torch.ones_like(seq_idx)}, {"past_key_values": new_cache(hybrid.config)}):
        with pytest.raises(ValueError, match="no attention_mask and no cache"):
            hybrid(tokens(), seq_idx=seq_idx, **given)


def test_flash_attention_would_mix_documents_of_several_rows(tiny_hybrid: Hybrid) -> None:
    model = tiny_hybrid()
    model.config._attn_implementation_internal = "flash_attention_2"
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    with pytest.raises(UnsupportedError, match=r"flash_attention_2 keeps.*one row.*sdpa"):
        model(tokens(2, 4), position_ids=positions)


@torch.no_grad()
def test_mixer_traces_are_the_forward_pass(model: HybridForCausalLM) -> None:
    ids, count = tokens(), model.config.num_hidden_layers
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.mixer.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out[0])}))
        for i, layer in enumerate(model.model.layers)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    expected = dict(seen)
    for wanted in (list(range(count)), [0], [count - 1]):
        traces = list(model.model.mixer_traces(ids, wanted))
        assert [trace.layer_idx for trace in traces] == wanted
        for trace in traces:
            close(trace.input_BTD, expected[trace.layer_idx][0])
            close(trace.output_BTD, expected[trace.layer_idx][1])


def test_loss_is_the_plain_one(model: HybridForCausalLM) -> None:
    ids = tokens()
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, expected, atol=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss  # as Trainer calls it
    assert torch.allclose(summed * 100, expected * (labels[:, 1:] != -100).sum(), rtol=1e-5)


def gradients(model: HybridForCausalLM, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    ids = tokens()
    model(ids, labels=ids, **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model: HybridForCausalLM, reentrant: bool) -> None:
    model.train()
    expected = gradients(model, use_cache=False)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in expected.values())
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.enable_input_require_grads()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(count)
    actual = gradients(model, use_cache=False)
    handle.remove()
    assert calls == 2, "the block was not run again in the backward pass"
    for name, gradient in expected.items():
        close(actual[name], gradient, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_gradient_checkpointing_with_a_cache(model: HybridForCausalLM, reentrant: bool, use_cache: bool) -> None:
    """A cache that the first pass filled would be met by the second: transformers leaves it out, and warns."""
    model.train()
    expected = gradients(model, past_key_values=new_cache(model.config))
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, past_key_values=new_cache(model.config), use_cache=use_cache)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient, 1e-6)


def test_training_with_the_default_cache_setting(hybrid: HybridForCausalLM) -> None:
    """``use_cache`` is on in the configuration: a training step that leaves it so is the same step."""
    hybrid.train()
    expected = gradients(hybrid, use_cache=False)
    for name, gradient in gradients(hybrid).items():
        close(gradient, expected[name], 1e-6)


@torch.no_grad()
def test_attention_backends_agree(model: HybridForCausalLM) -> None:
    ids, mask = tokens(), torch.ones(2, T, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_hidden_states_and_attentions(hybrid: HybridForCausalLM) -> None:
    ids = tokens()
    hybrid.set_attn_implementation("eager")
    output = hybrid(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5
    close(output.hidden_states[0], hybrid.model.embed_tokens(ids))
    close(hybrid.lm_head(output.hidden_states[-1]), output.logits)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, T, T)] * 2  # the two attention layers
    for weights in output.attentions:
        close(weights.sum(-1), torch.ones(2, 4, T))
        assert weights.triu(1).abs().max() == 0
    plain = hybrid(ids)
    assert plain.hidden_states is None
    assert plain.attentions is None


@torch.no_grad()
def test_logits_to_keep(model: HybridForCausalLM) -> None:
    ids = tokens()
    expected = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=1).logits, model(ids, logits_to_keep=torch.tensor([T - 1])).logits)
    close(model(ids, logits_to_keep=3).logits, expected[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, expected[:, [0, 5]])


@torch.no_grad()
def test_embeddings_as_input(model: HybridForCausalLM) -> None:
    ids = tokens()
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits, 0)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@torch.no_grad()
def test_return_as_tuple(hybrid: HybridForCausalLM) -> None:
    ids = tokens()
    loss, logits, cache = hybrid(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0
    assert logits.shape == (2, T, 96)
    assert cache.get_seq_length() == T


@torch.no_grad()
def test_half_precision(model: HybridForCausalLM) -> None:
    ids = tokens()
    expected = model(ids).logits
    model.bfloat16()
    output = model(ids, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - expected).norm() <= 0.05 * expected.norm()
    following = model(ids[:, :1], past_key_values=output.past_key_values)
    assert following.logits.dtype == torch.bfloat16


def test_rope_frequencies_stay_float32(hybrid: HybridForCausalLM) -> None:
    expected = hybrid.model.rotary_emb.inv_freq.clone()
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.float32)):
        cast(hybrid)
        assert torch.equal(hybrid.model.rotary_emb.inv_freq, expected)
    assert hybrid.model.embed_tokens.weight.dtype == torch.float32


@torch.no_grad()
def test_autocast_keeps_scans_in_float32(hybrid: HybridForCausalLM) -> None:
    ids = tokens()
    expected = hybrid(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = hybrid(ids, use_cache=True)
    assert (output.logits.float() - expected).norm() <= 0.05 * expected.norm()
    assert output.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32


def test_cache_of_the_right_kind(model: HybridForCausalLM) -> None:
    cache = new_cache(model.config)
    assert len(cache.layers) == model.config.num_hidden_layers
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        assert hasattr(layer, "keys") == isinstance(block.mixer, AttentionMixer)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba2", "mamba1"])
def test_a_cache_without_attention_counts_and_resets(tiny_hybrid: Hybrid, name: str) -> None:
    model, ids = tiny_hybrid(LAYERS[name]), tokens()
    cache = new_cache(model.config)
    for _ in range(2):
        assert cache.get_seq_length() == 0
        output = model(ids, past_key_values=cache)
        close(output.logits, model(ids, use_cache=False).logits)
        assert cache.get_seq_length() == T
        cache.reset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3"),
        ({"hidden_size": 0}, "hidden_size is 0"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str, tiny_hybrid: Hybrid) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        tiny_hybrid(**changes)


def test_unknown_mixer(tiny_hybrid: Hybrid) -> None:
    with pytest.raises(InvalidOptionError, match=r"unknown mixer 'mamba3'.*'mamba"):
        tiny_hybrid(["mamba3"])


@pytest.mark.parametrize(("window", "tokens", "masked"), [(None, 9, False), (6, 6, False), (6, 7, True)])
def test_attention_gets_no_mask_where_causality_is_all_there_is(
    tiny_hybrid: Hybrid, window: int | None, tokens: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a CUDA graph is recorded transformers 5.17 would make one, T² numbers that every layer keeps."""
    model = tiny_hybrid(["attention", "mamba2"], sliding_window=window)
    made = []

    def make(**arguments: object) -> torch.Tensor:
        made.append(arguments)
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()

    for kind in ("full_attention", "sliding_attention"):
        monkeypatch.setitem(mambify.model._MASKS, kind, make)
    x = torch.zeros(2, tokens, model.config.hidden_size)
    positions = torch.arange(tokens)[None]
    contexts = model.model.contexts(x, None, positions, None, None, {})
    kind = "full_attention" if window is None else "sliding_attention"
    assert (contexts[kind].attention_mask is not None) == masked == bool(made)
    documents = torch.arange(tokens).div(4, rounding_mode="floor").expand(2, -1)
    assert model.model.contexts(x, None, positions, None, documents, {})[kind].attention_mask is not None
    padding = torch.ones(2, tokens, dtype=torch.long)
    assert model.model.contexts(x, padding, positions, None, None, {})[kind].attention_mask is not None
    model.set_attn_implementation("eager")
    assert model.model.contexts(x, None, positions, None, None, {})[kind].attention_mask is not None
