"""What can be said of each kind of stage: one section a kind, and the table of all of them.

Where a default comes from a paper, the comment beside it says so.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from mambify.distill.sections import Count, CountOrNone, Positive, Section, Share, StageData, Weight

S = TypeVar("S", bound="StageSettings")

#: a mixing matrix has a number for each pair of tokens, and each head has one
MAX_MATRIX_CONTEXT = 512


class StageSettings(Section):
    """What all stages have.

    ``batch_tokens`` of a step are shared by all processes; ``micro_batch`` sequences are in memory at once in each of
    them, and divide its share. ``tokens`` are those of the whole run: where the conversion goes in several steps, a
    stage that is run at each of them has an equal part for each.
    """

    #: what of the text the stage takes otherwise than the recipe, unless it says so itself
    data_defaults: ClassVar[dict[str, Any]] = {}
    #: sequences of an item of its data
    rows: ClassVar[int] = 1
    #: takes a backward pass for each layer
    layerwise: ClassVar[bool] = False
    #: takes each row as one text, and cannot keep packed documents apart
    whole_rows: ClassVar[bool] = False

    tokens: Count
    batch_tokens: Count = 16384
    learning_rate: Positive
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: Annotated[float, Field(ge=0)] = 0.05
    schedule: str = "cosine_with_min_lr"
    min_learning_rate: Share = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_decay: Weight = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Weight = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    micro_batch: Annotated[int, Field(gt=0)] | None = None
    at: Literal["every_step", "last_step"] = "every_step"
    data: StageData = StageData()
    trainer: dict[str, Any] = Field(default_factory=dict)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part of the model (``mixer``, ``mlp``, ``rest``) → learning rate, of those that train."""
        return {"mixer": self.learning_rate}


class EndToEnd(StageSettings):
    """What the stages have that train the whole student at once."""

    mlp_learning_rate: Weight = 0.0
    rest_learning_rate: Weight = 0.0
    gradient_checkpointing: bool = False

    @property
    def learning_rates(self) -> dict[str, float]:
        rates = {"mixer": self.learning_rate, "mlp": self.mlp_learning_rate, "rest": self.rest_learning_rate}
        return {part: rate for part, rate in rates.items() if rate}


class Align(StageSettings):
    """Each new mixer learns to give what the attention at its place gave, on the teacher's own hidden states.

    ``calibration_tokens`` of the same text first set its output projection by least squares; 0 leaves that out.
    ``loss``: ``normalised`` is the squared error over the squared output, ``l2`` the length of the error vector of a
    token over the root of its size (RADLADS, arXiv 2505.03005).
    """

    layerwise: ClassVar[bool] = True

    kind: Literal["align"]
    learning_rate: Positive = 2e-3
    loss: Literal["normalised", "l2"] = "normalised"
    calibration_tokens: CountOrNone = 16384


class Mixing(StageSettings):
    """Each new mixer's matrix of who reads from whom learns the attention's (MOHAWK's first stage, arXiv 2408.10189).

    The loss is the Frobenius norm of their difference, averaged over heads and sequences.
    """

    data_defaults: ClassVar[dict[str, Any]] = {"packing": "concat"}
    layerwise: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = True

    kind: Literal["mixing"]
    learning_rate: Positive = 1e-3


class Hidden(StageSettings):
    """Each block that has a new mixer learns to give what the teacher's block gave, on the teacher's own hidden states.

    The loss is the length of a token's error vector (MOHAWK's second stage, arXiv 2408.10189).
    """

    layerwise: ClassVar[bool] = True

    kind: Literal["hidden"]
    learning_rate: Positive = 1e-3


class Kd(EndToEnd):
    """End to end: kl_weight · KL(teacher ‖ student) + reverse_kl_weight · KL(student ‖ teacher) + ce_weight · CE.

    ``tv_weight`` adds the total variation, 1 − Σ min(teacher, student): the chance that a drafted token is refused.

    A student with ``student.features`` goes over the text ``unroll`` times, the first time with the teacher's hidden
    states and then with its own of the time before; the loss of each time counts ``unroll_decay`` as much as the last.
    """

    kind: Literal["kd"]
    learning_rate: Positive = 1e-3
    unroll: Annotated[int, Field(gt=0, le=8)] = 3
    unroll_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    kl_weight: Weight = 1.0
    reverse_kl_weight: Weight = 0.0
    ce_weight: Weight = 0.0
    tv_weight: Weight = 0.0
    temperature: Positive = 1.0

    @model_validator(mode="after")
    def _wants_something(self) -> Kd:
        return _require_one(self, "kl_weight", "reverse_kl_weight", "ce_weight", "tv_weight")


class Sft(EndToEnd):
    """Cross-entropy on the answers of conversations; with ``kl_weight`` beside the KL to the teacher there."""

    data_defaults: ClassVar[dict[str, Any]] = {"answers_only": True}

    kind: Literal["sft"]
    learning_rate: Positive = 2e-5  # arXiv 2408.15237, the authors' code
    at: Literal["every_step", "last_step"] = "last_step"
    kl_weight: Weight = 0.0


class Dpo(EndToEnd):
    """Direct preference optimisation (arXiv 2305.18290): the answer that was preferred becomes likelier.

    ``reference`` is what the student is held to: the teacher, as in arXiv 2408.15237, or the student as the stage
    found it. ``sft_weight`` adds the negative log likelihood of a token of the preferred answer (arXiv 2404.19733),
    ``kl_weight`` the KL of the student to the reference on all tokens of the pair.
    """

    data_defaults: ClassVar[dict[str, Any]] = {"packing": "concat"}
    rows: ClassVar[int] = 2
    whole_rows: ClassVar[bool] = True

    kind: Literal["dpo"]
    learning_rate: Positive = 5e-7  # arXiv 2408.15237: 5e-7, with beta 0.01 for one epoch, or 0.1 for three
    at: Literal["every_step", "last_step"] = "last_step"
    beta: Positive = 0.1
    reference: Literal["teacher", "student"] = "teacher"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Weight = 0.0
    kl_weight: Weight = 0.0


class OnPolicy(EndToEnd):
    """Distillation on texts that the student itself has written (arXiv 2306.13649), a round of them at a time."""

    data_defaults: ClassVar[dict[str, Any]] = {"packing": "concat"}
    whole_rows: ClassVar[bool] = True

    kind: Literal["on_policy"]
    learning_rate: Positive = 2e-4
    at: Literal["every_step", "last_step"] = "last_step"
    tokens_per_round: Count = 262_144
    prompts: Literal["auto", "chat", "text", "mixed", "data"] = "auto"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    kl_weight: Weight = 0.0
    reverse_kl_weight: Weight = 1.0
    ce_weight: Weight = 0.0
    tv_weight: Weight = 0.0
    temperature: Positive = 1.0
    sampling_temperature: Positive = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    sampling_batch: Annotated[int, Field(gt=0)] = 64

    @model_validator(mode="after")
    def _wants_something(self) -> OnPolicy:
        return _require_one(self, "kl_weight", "reverse_kl_weight", "ce_weight", "tv_weight")


Stage = Annotated[Align | Mixing | Hidden | Kd | Sft | Dpo | OnPolicy, Field(discriminator="kind")]

#: kind → its section
STAGES: dict[str, type[StageSettings]] = {
    "align": Align,
    "mixing": Mixing,
    "hidden": Hidden,
    "kd": Kd,
    "sft": Sft,
    "dpo": Dpo,
    "on_policy": OnPolicy,
}


def _require_one(stage: S, *names: str) -> S:
    if not any(getattr(stage, name) for name in names):
        raise ValueError(f"one of {', '.join(names)} must be above 0")
    return stage
