"""Pure Mamba checkpoints give transformers' own logits, as they are and after a save of ours; and they speculate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import mambify
from mambify import HybridConfig, HybridForCausalLM
from mambify.cli.main import app
from mambify.conversion import plan, state_bytes
from mambify.conversion.cut import cut
from mambify.engine import Sampling, Speculator
from mambify.engine.slots import Slots
from mambify.errors import InvalidOptionError, UnsupportedError
from mambify.export.formats import FORMATS
from mambify.families.load import LoadedModel, save
from mambify.mixers import MIXERS
from tiny import byte_tokenizer

TOLERANCE = 1e-4
VOCABULARY, TOKENS = 96, 40
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
_MAMBA2: dict[str, Any] = {
    "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "chunk_size": 16, "n_groups": 1
}  # fmt: skip
#: name → (transformers' class, its configuration)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"hidden_size": 24, "state_size": 8}),
    "mamba-biased": ("Mamba", {"hidden_size": 24, "state_size": 16, "use_bias": True, "time_step_rank": 5}),
    "mamba-no-conv-bias": ("Mamba", {"hidden_size": 24, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}),
    "mamba-untied": ("Mamba", {"hidden_size": 24, "tie_word_embeddings": False, "residual_in_fp32": False}),
    "mamba2": ("Mamba2", _MAMBA2),
    "mamba2-tied": ("Mamba2", _MAMBA2 | {"tie_word_embeddings": True}),
    "mamba2-groups": ("Mamba2", _MAMBA2 | {"n_groups": 4}),
    "mamba2-biased": ("Mamba2", _MAMBA2 | {"n_groups": 2, "use_bias": True, "use_conv_bias": False}),
    "mamba2-limits": ("Mamba2", _MAMBA2 | {"n_groups": 8, "time_step_limit": (0.01, 0.05)}),
}
ONE_EACH = ["mamba-biased", "mamba2-groups"]


def stock(kind: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """transformers' own model, every parameter random."""
    name, special = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**_SHARED | special | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, HybridForCausalLM]]:
    """A model of transformers, and what we read from its files; made once a module."""
    made: dict[str, tuple[PreTrainedModel, HybridForCausalLM]] = {}

    def pair(kind: str) -> tuple[PreTrainedModel, HybridForCausalLM]:
        if KINDS[kind][1].get("n_groups", 1) > 1 and Version(transformers.__version__) < Version("5.23"):
            pytest.skip("transformers before 5.23 norms all groups of Mamba2 at once, which is another function")
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            theirs = stock(kind)
            theirs.save_pretrained(directory)
            made[kind] = theirs, mambify.load(directory).model
        return made[kind]

    return pair


Pairs = Callable[[str], tuple[PreTrainedModel, HybridForCausalLM]]


def tokens(batch: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits(pairs: Pairs, kind: str) -> None:
    theirs, ours = pairs(kind)
    ids = tokens(2)
    expected = theirs(ids).logits
    assert expected.std() > 0.1  # else anything is equal
    assert difference(ours(ids).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding(pairs: Pairs, kind: str) -> None:
    """In parts of any length; transformers' own cached steps leave the limits of Δ out."""
    theirs, ours = pairs(kind)
    ids = tokens(2)
    cache, parts = None, []
    for start, end in [(0, 9), (9, 10), (10, 11), (11, 30), (30, 31), *((i, i + 1) for i in range(31, TOKENS))]:
        output = ours(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert difference(torch.cat(parts, 1), theirs(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_rows_are_as_alone(pairs: Pairs, kind: str) -> None:
    _, ours = pairs(kind)
    ids, mask = tokens(3), torch.ones(3, TOKENS, dtype=torch.long)
    alone = ours(ids[1:2, 17:]).logits
    ids[1, :17], mask[1, :17] = 0, 0
    logits = ours(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert difference(logits[1:2, 17:], alone) <= TOLERANCE


@pytest.mark.parametrize("kind", ONE_EACH)
@torch.no_grad()
def test_packed_documents_are_as_alone(pairs: Pairs, kind: str) -> None:
    _, ours = pairs(kind)
    ids = tokens(1)
    positions = torch.cat([torch.arange(13), torch.arange(TOKENS - 13)])[None]
    packed = ours(ids, position_ids=positions).logits
    parts = [ours(part).logits for part in ids.split([13, TOKENS - 13], 1)]
    assert difference(packed, torch.cat(parts, 1)) <= TOLERANCE


@pytest.mark.parametrize("kind", ONE_EACH)
def test_gradients_reach_every_parameter(pairs: Pairs, kind: str) -> None:
    """A pure Mamba draft can be trained."""
    theirs, ours = pairs(kind)
    ids = tokens(2, 12)
    expected = torch.autograd.grad(theirs(ids, labels=ids).loss, list(theirs.parameters()))
    actual = torch.autograd.grad(ours(ids, labels=ids).loss, list(ours.parameters()))
    mine = {name: gradient for (name, _), gradient in zip(ours.named_parameters(), actual, strict=True)}
    family = mambify.families.registry.family_for(theirs.config.model_type, source="")
    for (name, _), gradient in zip(theirs.named_parameters(), expected, strict=True):
        found = mine.pop(str(family.rename(name)))
        assert difference(found, gradient) <= 1e-4 * float(gradient.abs().max().clamp(min=1e-3)), name
    assert not mine


@pytest.mark.parametrize("kind", ["mamba", "mamba2-tied", *ONE_EACH])
def test_saved_by_us_and_read_again(pairs: Pairs, kind: str, tmp_path: Path) -> None:
    _, ours = pairs(kind)
    ids = tokens(1)
    save(ours, tmp_path / "own")
    expected = ours(ids).logits
    assert torch.equal(mambify.load(tmp_path / "own").model(ids).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert isinstance(again, HybridForCausalLM) and torch.equal(again(ids).logits, expected)
    card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "no layer is converted" in card and "made from" not in card


@pytest.mark.parametrize("kind", ONE_EACH)
@torch.no_grad()
def test_bfloat16_has_a_float32_stream(kind: str, tmp_path: Path) -> None:
    stock(kind).bfloat16().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, ids = mambify.load(tmp_path).model, tokens(2)
    exact = mambify.load(tmp_path, dtype="float32").model(ids).logits
    assert ours.model.embed_tokens(ids).dtype == torch.float32 and ours(ids).logits.dtype == torch.bfloat16
    assert {p.dtype for n, p in ours.named_parameters() if not n.endswith(("A_log", ".D", "dt_bias"))} == {
        torch.bfloat16
    }
    # As near to the exact logits as transformers comes.
    assert difference(ours(ids).logits.float(), exact) <= 1.5 * difference(theirs(ids).logits.float(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_sequence(pairs: Pairs, kind: str) -> None:
    _, ours = pairs(kind)
    states = [ours.model.layers[i].mixer.load_state(ours(tokens(1)).past_key_values) for i in range(3)]
    held = sum(part.numel() * part.element_size() for state in states for part in state)
    assert state_bytes(ours.config, 8) == state_bytes(ours.config, 100_000) == held


def plain(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 3, 4, 5], list(range(30, 60))]


@pytest.mark.parametrize("drafts", [None, "lookup", "cut", "own", "other", "itself"])
@pytest.mark.parametrize("kind", ["mamba", "mamba-biased", "mamba2", "mamba2-groups"])
def test_speculation_gives_transformers_tokens(pairs: Pairs, kind: str, drafts: str | None, tmp_path: Path) -> None:
    """Greedy, in float32: with a draft of the same kind, of the other kind, and the target itself."""
    theirs, target = pairs(kind)
    draft: Any = drafts
    if drafts in ("own", "other"):
        other = {"mamba": "mamba2", "mamba2": "mamba"}[kind.partition("-")[0]]
        stock(kind if drafts == "own" else other, seed=5, num_hidden_layers=1).save_pretrained(tmp_path)
        draft = mambify.load(tmp_path).model
    elif drafts == "itself":
        draft = target
    elif drafts == "cut":
        draft = cut(target, 1, token_ids=torch.arange(0, target.config.vocab_size, 2))
    speculator = Speculator(
        target, draft, num_slots=3, max_length=96, sampling=Sampling(temperature=0.0), num_draft_tokens=4
    )
    answers: list[list[int]] = [[] for _ in PROMPTS]
    for number, given in speculator.run(PROMPTS, max_new_tokens=40):
        answers[number] += given
    assert answers == [plain(theirs, prompt, 40) for prompt in PROMPTS]
    if drafts == "itself":
        assert speculator.statistics.tokens_per_round > 4


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize("drafted", [1, 16])
def test_fewest_and_most_drafted_tokens(pairs: Pairs, kind: str, drafted: int) -> None:
    theirs, target = pairs(kind)
    speculator = Speculator(
        target, target, num_slots=1, max_length=96, sampling=Sampling(temperature=0.0), num_draft_tokens=drafted
    )
    found = [token for _, given in speculator.run([PROMPTS[2]], max_new_tokens=50) for token in given]
    assert found == plain(theirs, PROMPTS[2], 50)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba", "mamba2", *ONE_EACH])
def test_speculation_by_kernels(pairs: Pairs, kind: str, tmp_path: Path) -> None:
    """The same tokens on a GPU, where a round is a recorded graph of the kernels."""
    theirs, _ = pairs(kind)
    theirs.save_pretrained(tmp_path)
    target = mambify.load(tmp_path, device="cuda").model
    for draft in (None, target):
        speculator = Speculator(target, draft, num_slots=3, max_length=96, sampling=Sampling(temperature=0.0))
        answers: list[list[int]] = [[] for _ in PROMPTS]
        for number, given in speculator.run(PROMPTS, max_new_tokens=40):
            answers[number] += given
        assert answers == [plain(theirs, prompt, 40) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ONE_EACH)
def test_slots_need_no_positions(pairs: Pairs, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pairs(kind)

    def refuse(*_: Any) -> None:
        raise AssertionError("asked for positions")

    monkeypatch.setattr(ours.model.rotary_emb, "forward", refuse)
    with torch.inference_mode():
        slots = Slots(ours, sizes=[1], length=32, num_forced=1, sampling=Sampling(temperature=0.0), stop_ids=[])
        control = slots.control
        control.token_S[0], control.budget_S[0], control.active_S[0] = 9, 20, True
        for _ in range(20):
            slots.step(1)
    assert control.history_SL[0, 1:21].tolist() == plain(theirs, [9], 20)
    Speculator(ours, ours, num_slots=1, max_length=32, sampling=Sampling(temperature=0.0))


@pytest.mark.parametrize("kind", ONE_EACH)
def test_what_is_not_for_pure_mamba_says_so(pairs: Pairs, kind: str) -> None:
    _, ours = pairs(kind)
    with pytest.raises(UnsupportedError, match="is a pure Mamba model: it has no attention that could be replaced"):
        mambify.convert(ours, attention=0.5)
    with pytest.raises(UnsupportedError, match="pure Mamba"):
        plan(ours.config, attention_layers=[1])
    for form in FORMATS.values():
        with pytest.raises(UnsupportedError, match="pure Mamba"):
            form.require(ours.config)
    with pytest.raises(InvalidOptionError, match="unknown mixer 'stock_mamba2'"):
        plan(HybridConfig(num_hidden_layers=2), mixer="stock_mamba2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_num_heads": 5}, "ssm_inner_size is 64: it has to be a multiple of ssm_num_heads, 5"),
        ({"ssm_num_groups": 3}, "ssm_num_heads is 8: it has to be a multiple of ssm_num_groups, 3"),
        ({"ssm_state_size": 0}, "ssm_state_size is 0: it has to be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size is -1: it has to be at least 0"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, int], message: str) -> None:
    sizes = {"ssm_inner_size": 64, "ssm_num_heads": 8, "ssm_num_groups": 2, "ssm_state_size": 16}
    with pytest.raises(InvalidOptionError, match=message):
        HybridConfig(**sizes | changes)


@pytest.mark.parametrize("name", ["stock_mamba1", "stock_mamba2"])
def test_a_size_that_is_not_given(name: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{name} needs ssm_inner_size"):
        MIXERS[name](HybridConfig(), 0)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    stock("mamba", hidden_act="gelu").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="hidden_act is gelu"):
        mambify.load(tmp_path)


@pytest.mark.parametrize("kind", ONE_EACH)
def test_commands(kind: str, tmp_path: Path) -> None:
    """info, generate (with a draft) and evaluate take a directory of transformers' as it is."""
    tokenizer = byte_tokenizer()
    for name, layers in (("target", 3), ("draft", 1)):
        theirs = stock(kind, vocab_size=len(tokenizer), num_hidden_layers=layers, seed=layers)
        theirs.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    target, run = str(tmp_path / "target"), CliRunner()

    facts = json.loads(run.invoke(app, ["info", target, "--json"]).stdout)
    assert facts["pure_mamba"]["inner_size"] == 2 * facts["hidden_size"]
    loaded: LoadedModel = mambify.load(target)
    unique = {id(p): p.numel() for p in loaded.model.parameters()}
    assert facts["parameters"] == sum(unique.values())
    shown = run.invoke(app, ["info", target])
    assert "pure Mamba of the" in shown.stdout and "no feed-forward" in shown.stdout

    asked = ["generate", target, "The quick", "--max-new-tokens", "12", "--temperature", "0"]
    alone = run.invoke(app, asked)
    assert alone.exit_code == 0, alone.output
    drafted = run.invoke(app, [*asked, "--draft", str(tmp_path / "draft")])
    assert drafted.exit_code == 0, drafted.output
    assert alone.stdout.strip() in drafted.stdout

    asked = ["evaluate", target, "--text", str(tmp_path / "text.txt"), "--context-length", "64", "--json", "-"]
    evaluated = run.invoke(app, asked)
    assert evaluated.exit_code == 0, evaluated.output
