"""A draft that learns to read its target's hidden states, against one that has the tokens alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambify.conversion.cut import cut
from mambify.decode import generate
from mambify.distill.features import FeatureDistiller
from mambify.distill.settings import Kd
from mambify.distill.stages import stage_module
from mambify.errors import InvalidOptionError
from mambify.evaluate import acceptance
from mambify.evaluate.acceptance import expected_acceptance, measured_acceptance
from mambify.feature_input import shifted
from mambify.model import HybridForCausalLM
from speculating import converted, model

WORDS, ORDERS = 16, 4


def texts(count: int, length: int, seed: int) -> Tensor:
    """Each goes through the words in one of four orders, with slips: which one it is, only the text so far tells."""
    following = torch.stack(
        [torch.randperm(WORDS, generator=torch.Generator().manual_seed(order)) for order in range(ORDERS)]
    )
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randint(ORDERS, (count,), generator=generator)
    tokens = [torch.randint(WORDS, (count,), generator=generator)]
    for _ in range(length - 1):
        slips_N = torch.rand(count, generator=generator) < 0.1
        other_N = torch.randint(WORDS, (count,), generator=generator)
        tokens.append(torch.where(slips_N, other_N, following[order_N, tokens[-1]]))
    return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    """A hybrid that has learnt to tell the orders apart."""
    path = tmp_path_factory.mktemp("target")
    target = converted(model(path, vocabulary=WORDS, initializer_range=0.1, eos_token_id=None))
    optimizer = torch.optim.Adam(target.parameters(), 5e-3)
    for step in range(200):
        ids_BT = texts(32, 24, step)
        optimizer.zero_grad()
        target(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    return target.eval().requires_grad_(False)


def trained(target: HybridForCausalLM, *, features: bool, unroll: int = 3, steps: int = 100) -> HybridForCausalLM:
    """One layer of the target after a hundred steps of stage kd."""
    draft, rate = cut(target, [1], features=features), 1e-2
    rates = {"learning_rate": rate, "mlp_learning_rate": rate, "rest_learning_rate": rate}
    module = stage_module(Kd(kind="kd", tokens=1, unroll=unroll, **rates), draft, target)
    assert isinstance(module, FeatureDistiller) == features
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
    data_NT = texts(512, 32, 1000)
    for step in range(steps):
        ids_BT = data_NT[torch.randint(512, (16,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        result = module(ids_BT, ids_BT)
        result.loss.backward()
        module.finish_gradients(result.sums)
        optimizer.step()
    return draft.eval().requires_grad_(False)


def test_hidden_states_are_worth_having(target: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds, at every place of them; and they are the ones that belong to the tokens."""
    start = texts(128, 8, 1001)
    written = generate(target, start, max_new_tokens=24, temperature=1.0, seed=0, eos_token_id=[])
    counted = written.clone()
    counted[:, :8] = -100

    def measured(draft: HybridForCausalLM) -> dict[str, object]:
        return measured_acceptance(
            target, draft, start.tolist(), num_draft_tokens=3, temperature=1.0, max_new_tokens=24, stop_ids=[],
            num_slots=128,
        )  # fmt: skip

    def expected(draft: HybridForCausalLM) -> float:
        return expected_acceptance(target, draft, written, counted, num_draft_tokens=1).acceptance_by_position[0]

    plain, once, reader = (
        trained(target, features=features, unroll=unroll) for features, unroll in ((False, 1), (True, 1), (True, 3))
    )
    found = [measured(draft) for draft in (plain, once, reader)]
    assert found[2]["tokens_per_round"] > found[0]["tokens_per_round"] + 0.2
    # Trained on the target's states alone, a draft knows the first token better than what follows from its own.
    assert found[2]["acceptance_by_position"][1] > found[1]["acceptance_by_position"][1] + 0.1
    assert found[2]["acceptance_by_position"][0] == pytest.approx(expected(reader), abs=0.03)
    right = expected(once)
    for wrong in (torch.zeros_like, lambda x: shifted(shifted(x)), lambda x: x):
        monkeypatch.setattr(acceptance, "shifted", wrong)
        assert expected(once) < right - 0.05
    with pytest.raises(InvalidOptionError, match="the first token of a round"):
        expected_acceptance(target, once, written, counted, num_draft_tokens=2)


def test_each_pass_reads_the_one_before(target: HybridForCausalLM) -> None:
    """The figures of three passes, packed documents included, against passes made one by one."""
    draft = trained(target, features=True, steps=3)
    module = FeatureDistiller(draft, target, unroll=3, decay=0.5)
    ids_BT = texts(2, 20, 7)
    positions_BT = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    for position_ids in (None, positions_BT):
        result = module(ids_BT, ids_BT, position_ids=position_ids)
        documents = [ids_BT] if position_ids is None else [ids_BT[:, :12], ids_BT[:, 12:]]
        states = [target.model.stream(each) for each in documents]
        wanted = [target.model.norm(each) @ target.lm_head.weight.T for each in states]
        for number in range(3):
            states = [draft.model.stream(ids, shifted(x)) for ids, x in zip(documents, states, strict=True)]
            found = [draft.model.norm(each) @ draft.lm_head.weight.T for each in states]
            p, q = (torch.cat(each, 1)[:, :-1].log_softmax(-1) for each in (wanted, found))
            name = "kl" if not number else f"kl_{number + 1}"
            kl = (p.exp() * (p - q)).sum()
            assert result.sums[name][0] == pytest.approx(float(kl), rel=1e-4)
        parts = [result.sums[name][0] for name in ("kl", "kl_2", "kl_3")]
        assert result.loss == pytest.approx(float(parts[0] + parts[1] / 2 + parts[2] / 4), rel=1e-5)
