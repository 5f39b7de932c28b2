"""``mambify draft`` from end to end on tiny models: the cut, its training, its files, its acceptance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mambify
from mambify.conversion.cut import cut
from mambify.decode.drafts import share_with_target
from mambify.errors import InvalidOptionError, OutputExistsError, RecipeError, UnsupportedError
from mambify.families.load import LoadedModel
from mambify.families.pack import pack
from mambify.model import HybridForCausalLM
from mambify.trimmed_head import TrimmedHead
from mambify.workflows.draft import Measure, Settings, draft, draft_recipe
from tiny import TEXT, byte_tokenizer, llama

QUICK = Measure(num_draft_tokens=(2,), temperatures=(0.0, 1.0), num_prompts=2, max_new_tokens=8, expected_tokens=256)
#: of a step; the stage's own is for a GPU
SMALL = ("stages.0.batch_tokens=256", "data.context_length=64", "log_every=5")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tokenizer = byte_tokenizer()
    llama(len(tokenizer), num_hidden_layers=4, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hybrid(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "student"
    loaded = mambify.load(target)
    student = mambify.convert(loaded, attention=0.5)
    return mambify.save(student, path, tokenizer=loaded.tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the fox", "a lazy dog", "good weather", "you and I", "how are they", "brown and quick"]
    generator = torch.Generator().manual_seed(0)
    rows = [" ".join(words[i] for i in torch.randint(6, (12,), generator=generator).tolist()) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(target: Path, text: Path, out: Path, *, steps: int = 12, **settings: Any) -> Any:
    overrides = (*SMALL, *settings.pop("overrides", ()))
    asked = Settings(data=[str(text)], tokens=steps * 256, overrides=overrides, **settings)
    return draft_recipe(str(target), asked, recipe=None, out=out)


@pytest.mark.parametrize(
    ("of", "settings", "mixers"),
    [
        ("target", {}, ["attention", "attention"]),
        ("target", {"overrides": ("precision=bfloat16",)}, ["attention", "attention"]),
        ("target", {"layers": [0, 1, 3], "mixer": "mamba2"}, ["mamba2"] * 3),
        ("target", {"mixer": "mamba1", "vocabulary": 90}, ["mamba1", "mamba1"]),
        ("hybrid", {"vocabulary": 90}, ["mamba2", "attention"]),
        ("hybrid", {"vocabulary": 90, "features": True, "mixer": "mamba2"}, ["mamba2", "mamba2"]),
    ],
)
def test_a_draft_is_trained_saved_and_measured(
    request: pytest.FixtureRequest, text: Path, tmp_path: Path, of: str, settings: dict[str, Any], mixers: list[str]
) -> None:
    source, out = request.getfixturevalue(of), tmp_path / "draft"
    report = draft(recipe_of(source, text, out, **settings), out, measure=QUICK, device="cpu")
    assert report == json.loads((out / "acceptance.json").read_text())
    loaded = mambify.load(out)
    model = loaded.model
    assert model.config.layer_mixers == mixers
    assert model.config.cut_from == settings.get("layers", [0, 3])

    # Everything of its layers is its own by now; what it shares is the target's to the bit, and the target unchanged.
    teacher = mambify.load(source).model
    assert torch.equal(model.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert not torch.equal(model.model.norm.weight, teacher.model.norm.weight)
    for ours, index in zip(model.model.layers, model.config.cut_from, strict=True):
        theirs = teacher.model.layers[index]
        assert not torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert not torch.equal(ours.input_layernorm.weight, theirs.input_layernorm.weight)
        assert type(ours.mixer) is not type(theirs.mixer) or any(
            not torch.equal(a, b) for a, b in zip(ours.mixer.parameters(), theirs.mixer.parameters(), strict=True)
        )

    assert [found["temperature"] for found in report["measured"]] == [0.0, 1.0]
    assert all(len(found["acceptance_by_position"]) == 2 for found in report["measured"])
    reads = bool(settings.get("features"))
    assert len(report["expected"]["acceptance_by_position"]) == (1 if reads else 2)
    card = (out / "README.md").read_text()
    assert "A draft for" in card and "tokens a round" in card

    again = AutoModelForCausalLM.from_pretrained(out)
    ids, features = torch.tensor([[5, 6, 7, 8]]), {}
    if reads:
        features["features"] = torch.randn(1, 4, model.config.hidden_size)
        assert model.model.feature_input.feature_proj.weight.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, **features).logits, model(input_ids=ids, **features).logits)
    if settings.get("vocabulary"):
        assert isinstance(again.lm_head, TrimmedHead) and again.lm_head.weight.shape[0] == 90
        assert {0, 1, 2} <= set(again.lm_head.token_ids.tolist())  # the special ones

    # The same command again has nothing left to train.
    before = (out / "model.safetensors").read_bytes()
    draft(recipe_of(source, text, out, **settings), out, measure=QUICK, device="cpu")
    assert (out / "model.safetensors").read_bytes() == before


def test_training_raises_acceptance(target: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for steps in (1, 120):
        out = tmp_path / str(steps)
        report = draft(recipe_of(target, text, out, steps=steps), out, measure=QUICK, device="cpu")
        assert report is not None
        found.append(report["expected"]["acceptance_by_position"][0])
    assert found[1] > found[0] + 0.1


def test_a_draft_goes_on_from_a_draft(target: Path, text: Path, tmp_path: Path) -> None:
    """With its layers and its words, on the loss that counts."""
    first, second = tmp_path / "first", tmp_path / "second"
    draft(recipe_of(target, text, first, layers=[0, 3], vocabulary=90), first, measure=QUICK, device="cpu")
    overrides = (f"student.base={first}", "stages.0.kl_weight=0", "stages.0.tv_weight=1")
    report = draft(recipe_of(target, text, second, overrides=overrides), second, measure=QUICK, device="cpu")
    assert report is not None and (report["layers"], report["vocabulary"]) == ([0, 3], 90)
    before, after = (mambify.load(path).model for path in (first, second))
    assert isinstance(before.lm_head, TrimmedHead) and isinstance(after.lm_head, TrimmedHead)
    assert before.lm_head.token_ids.equal(after.lm_head.token_ids)
    assert before.lm_head.weight.equal(after.lm_head.weight)
    rows = [json.loads(line) for line in Path(f"{second}.run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(rows[0]["tv"])


@pytest.mark.parametrize(("vocabulary", "features"), [(None, None), (90, None), (None, True)])
def test_a_draft_can_be_stored_without_its_embeddings(
    target: Path, text: Path, tmp_path: Path, vocabulary: int | None, features: bool | None
) -> None:
    out, small = tmp_path / "draft", tmp_path / "small"
    recipe = recipe_of(target, text, out, steps=2, vocabulary=vocabulary, features=features)
    draft(recipe, out, measure=QUICK, device="cpu")
    packed = pack(out, small, base=str(target), dtype="float32")
    embeddings = mambify.load(target).model.model.embed_tokens.weight
    assert packed.num_kept == embeddings.numel() + (vocabulary or 0) * embeddings.shape[1]  # the head's rows are theirs
    whole, completed = mambify.load(out).model, mambify.load(small).model
    for (name, a), (_, b) in zip(whole.state_dict().items(), completed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    hub: HybridForCausalLM = AutoModelForCausalLM.from_pretrained(small)
    assert torch.equal(hub.lm_head.weight, whole.lm_head.weight)

    # Beside its target it has nothing twice.
    teacher = mambify.load(target).model
    share_with_target(whole, teacher)
    assert whole.model.embed_tokens is teacher.model.embed_tokens
    assert (whole.lm_head is teacher.lm_head) == (vocabulary is None)


def test_a_trimmed_draft_is_not_exported(target: Path, tmp_path: Path) -> None:
    loaded = mambify.load(target)
    trimmed = cut(loaded, 2, token_ids=torch.arange(50))
    with pytest.raises(UnsupportedError, match="without --vocabulary"):
        mambify.export_transformers(trimmed, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="without --vocabulary"):
        mambify.export_gguf(trimmed, loaded.tokenizer, tmp_path / "out.gguf")
    reader = cut(loaded, 2, features=True)
    with pytest.raises(UnsupportedError, match="without --features"):
        mambify.export_transformers(reader, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="without --features"):
        mambify.export_gguf(reader, loaded.tokenizer, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_teacher_and_two_layers_of_it(smollm2: LoadedModel, tmp_path: Path) -> None:
    """A few steps on a few words: acceptance is poor, and what comes out is the teacher's own."""
    text, out = tmp_path / "text.jsonl", tmp_path / "draft"
    words = TEXT.split()
    rows = [{"text": f"{i}: " + " ".join(words[i % 19 : i % 19 + 40])} for i in range(120)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = Settings(
        layers=2, data=[str(text)], tokens=8 * 256, vocabulary=512,
        overrides=["stages.0.batch_tokens=256", "data.context_length=64", "precision=float32"],
    )  # fmt: skip
    loaded = smollm2
    report = draft(
        draft_recipe("smollm2", asked, recipe=None, out=out), out, measure=QUICK, device="cpu", target=loaded
    )
    assert report is not None and report["vocabulary"] == 512
    assert report["expected"]["known_probability"] < 1.0
    trained = mambify.load(out).model
    ids = torch.tensor([loaded.tokenizer.encode("The quick brown fox")])
    plain = mambify.generate(loaded.model, ids, max_new_tokens=8)
    for guess, number in ((trained, 3), ("cut:2", (1, 2))):
        assert torch.equal(
            mambify.generate(loaded.model, ids, max_new_tokens=8, draft=guess, num_draft_tokens=number), plain
        )


def test_what_cannot_be_is_refused_and_nothing_written(target: Path, hybrid: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    with pytest.raises(RecipeError, match="--data"):
        draft_recipe(str(target), Settings(), recipe=None, out=out)
    with pytest.raises(InvalidOptionError, match="did you mean 'mamba2'"):
        recipe_of(target, text, out, mixer="mamba3")
    with pytest.raises(InvalidOptionError, match="name layers that have attention, of 1,3"):
        recipe_of(hybrid, text, out, layers=[0, 3], mixer="attention")
    for settings, error, words in (
        ({"layers": 9}, InvalidOptionError, "choose 1 to 4"),
        ({"layers": [0, 7]}, InvalidOptionError, "layers 0 to 3"),
        ({"vocabulary": 4000}, InvalidOptionError, "can know 1 to"),
        ({"vocabulary": 90, "overrides": ("stages.0.ce_weight=0.5",)}, RecipeError, "leaves words without"),
        ({"features": True, "overrides": ("stages.0.kind=on_policy",)}, RecipeError, "trained by stage kd only"),
        ({"features": True, "overrides": ("stages.0.rest_learning_rate=0",)}, RecipeError, "at rest_learning_rate"),
    ):
        with pytest.raises(error, match=words):
            draft(recipe_of(target, text, out, **settings), out, measure=QUICK, device="cpu")
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(OutputExistsError):
        draft(recipe_of(target, text, out), out, measure=QUICK, device="cpu")


def test_an_earlier_draft_is_replaced_with_its_run(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    for layers in ([0, 3], [0, 1, 3]):
        recipe = recipe_of(target, text, out, steps=1, layers=layers)
        draft(recipe, out, measure=QUICK, device="cpu", overwrite=True)
        assert mambify.load(out).model.config.cut_from == layers
    with pytest.raises(OutputExistsError, match="a run of another recipe"):
        draft(recipe_of(target, text, out, steps=1), out, measure=QUICK, device="cpu")
