"""The real teacher: calibration alone recovers much of it, and both stages train it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambify.conversion import calibrate, convert
from mambify.data.preferences import PreferenceDataset, as_blocks, read_preferences
from mambify.decode.stream import stream
from mambify.distill.kd import KnowledgeDistiller
from mambify.distill.logs import read_metrics
from mambify.distill.recipe import parse_recipe
from mambify.evaluate import preference_accuracy
from mambify.workflows.distill import distill

if TYPE_CHECKING:
    from mambify.families.load import LoadedModel

TEXT = """The Nile is the longest river of Africa. It rises in the highlands and flows north through Sudan and Egypt
to the Mediterranean Sea. Every summer its flood left dark mud on the fields, and the farmers sowed as soon as the water
fell. Cities grew along its banks because boats could sail south with the wind and drift north with the stream. """


def test_calibration_brings_a_fresh_student_near_the_teacher(smollm2: LoadedModel) -> None:
    """Least squares on a page of text: the KL to the teacher on the next page falls by far more than half."""
    assert smollm2.tokenizer is not None
    ids = torch.tensor([smollm2.tokenizer(TEXT * 6).input_ids])
    train, held = ids[:, :256], ids[:, -96:]
    student = convert(smollm2, attention_layers=[i for i in range(30) if i not in (10, 20)])
    distiller = KnowledgeDistiller(student, smollm2.model)

    def kl() -> float:
        with torch.no_grad():
            result = distiller(input_ids=held, labels=held, num_items=torch.tensor(float(held.numel())))
        return float(result.metrics["kl"])

    before = kl()
    errors = calibrate(student, smollm2.model, [train])
    assert all(after < 1 < fresh for fresh, after in errors.values())
    assert kl() < 0.25 * before


def test_answers_and_preferences_train_the_real_teacher(
    smollm2: LoadedModel, shared_data: Path, tmp_path: Path
) -> None:
    """A few steps of sft on real conversations, then of dpo on real pairs: from chance to a preference."""
    align = {"kind": "align", "tokens": 128, "batch_tokens": 128, "calibration_tokens": 1024}
    sft = {"kind": "sft", "tokens": 2 * 128, "batch_tokens": 128, "learning_rate": 1e-4}
    dpo = {"kind": "dpo", "tokens": 4 * 256, "batch_tokens": 256, "learning_rate": 1e-4, "reference": "student"}
    pairs = tmp_path / "pairs.jsonl"
    rows = (shared_data / "train_pref" / "ultrafeedback_binarized_train1000.jsonl").read_text("utf-8").splitlines()
    short = [row for row in rows if len(row) < 700][:1]
    pairs.write_text("\n".join(short) + "\n", encoding="utf-8")
    recipe = parse_recipe(
        {
            "teacher": "smollm2",
            "student": {"attention_layers": [i for i in range(30) if i not in (10, 20)]},
            "data": {
                "train": str(shared_data / "train_instruct" / "dolly_hhrlhf_train_small.jsonl"),
                "context_length": 128,
            },
            "stages": [align, sft, {**dpo, "data": {"train": str(pairs)}}],
            "output": str(tmp_path / "run"),
            "report_to": [],
            "log_every": 1,
        }
    )
    student, run = distill(recipe, device="cpu", teacher=smollm2)
    figures = read_metrics(run / "metrics.jsonl")
    ce = [row["ce"] for row in figures if row["stage"] == "02-sft"]
    assert len(ce) == 2 and all(0.5 < value < 4 for value in ce)
    margins = [row["rewards/margins"] for row in figures if row["stage"] == "03-dpo"]
    assert abs(margins[0]) < 0.05 and margins[-1] > 0.1
    score = preference_accuracy(student, smollm2.model, _as_blocks(pairs, smollm2), batch_size=2, resamples=10)
    assert score.num_pairs == 1 and score.margin is not None


def _as_blocks(path: Path, teacher: LoadedModel) -> list[Any]:
    assert teacher.tokenizer is not None
    read = read_preferences(path, teacher.tokenizer)
    return list(as_blocks(PreferenceDataset(read.pairs, 128, dropped=read.dropped)))


def test_align_and_kd_train_the_real_teacher_and_it_still_speaks(smollm2: LoadedModel, tmp_path: Path) -> None:
    assert smollm2.tokenizer is not None
    text = tmp_path / "nile.txt"
    text.write_text("\n\n".join([TEXT] * 12), encoding="utf-8")
    stage = {"tokens": 4 * 128, "batch_tokens": 128}
    recipe = parse_recipe(
        {
            "teacher": "smollm2",
            "student": {"attention_layers": [i for i in range(30) if i not in (10, 20)]},
            "data": {"train": str(text), "context_length": 64},
            "stages": [
                {"kind": "align", "calibration_tokens": 512, "learning_rate": 2e-4, **stage},
                {"kind": "kd", "learning_rate": 2e-4, **stage},
            ],
            "output": str(tmp_path / "run"),
            "report_to": [],
            "log_every": 1,
        }
    )
    student, run = distill(recipe, device="cpu", teacher=smollm2)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "02-kd"] == [1, 2, 3, 4]
    kept, ours = smollm2.model.state_dict(), student.state_dict()
    same = [name for name in kept if ".layers.10.mixer" not in name and ".layers.20.mixer" not in name]
    assert all(torch.equal(kept[name], ours[name]) for name in same)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = "".join(stream(student, smollm2.tokenizer, question, max_new_tokens=12, temperature=0.0))
    prompt = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    uncached = student.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    expected = smollm2.tokenizer.decode(uncached[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == expected.strip() != ""
