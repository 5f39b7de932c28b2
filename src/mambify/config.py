"""HybridConfig: what a model is made of. The teacher's block facts, and per layer which mixer sits in it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mambify.errors import InvalidOptionError

ATTENTION = "attention"
LINEAR = "linear_attention"
STOCK = "stock_"  # how the names of mixers begin that are never made from attention

_LEAST = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 0, "num_attention_heads": 1} | dict.fromkeys(
    ("ssm_inner_size", "ssm_state_size", "ssm_dt_rank", "ssm_num_heads", "ssm_num_groups"), 1
)


class HybridConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of :class:`mambify.model.HybridForCausalLM`.

    The fields are the union of what the supported Transformer families vary, under transformers' own
    names, and some of ours:

    Args:
        intermediate_size: width of the MLPs; 0 for blocks that have none (norm, mixer, sum), as pure Mamba models have.
        residual_in_fp32: the residual stream is float32 whatever the dtype of the weights.
        layer_mixers: one name a layer, ``"attention"`` or a row of :data:`mambify.mixers.MIXERS`.
            ``None`` means attention everywhere: the unconverted teacher.
        layer_types: transformers' cache and mask kind a layer (``full_attention``,
            ``sliding_attention``, ``linear_attention``). For a layer whose mixer is not attention it is
            always ``linear_attention``; derived when ``None``.
        attention_output_bias: whether ``o_proj`` has a bias; ``attention_bias`` speaks of q, k and v.
        qk_norm: RMS norm over each head of q and k before RoPE (Qwen3).
        conv_kernel: width K of the causal convolution of a Mamba mixer.
        mamba1_state_size: N of Mamba1; a head of P channels is P/N sub-heads.
        mamba1_dt_rank: rank of Mamba1's Δ projection; ``None`` is ⌈D/16⌉.
        cut_from: of a draft, the layers that it has of the model that it was cut from.
        draft_vocabulary: how many words the head of a draft knows, if not all; which ones stands beside its weight.
        draft_features: a draft reads its target's last hidden states beside the tokens; by itself it cannot be run.
        ssm_inner_size: I, channels of a stock Mamba mixer (``stock_mamba1``, ``stock_mamba2``).
        ssm_state_size: N of a stock mixer.
        ssm_dt_rank: rank of ``stock_mamba1``'s Δ projection.
        ssm_num_heads, ssm_num_groups: heads of ``stock_mamba2``, and groups of them that share B, C and a norm.
        ssm_proj_bias, ssm_conv_bias: whether a stock mixer's in_proj and out_proj, and its convolution, have biases.
        ssm_dt_min, ssm_dt_max: Δ of ``stock_mamba2`` is kept within these; ``None`` for no upper end.
        ops_backend: implementation of the Mamba mixers' operations over sequences: ``auto`` takes the fastest that
            runs where the tensors are, ``reference`` and ``triton`` insist on one.
        teacher_family: the family file that the teacher was read with.
        teacher: the name the teacher was loaded by.
        teacher_hub_id: where the teacher is on the Hub, if it is known to be there.
        teacher_license: ``license`` (and ``license_name``, ``license_link``) as the teacher states them.
        base: of a directory that holds mixers only, the model whose weights complete it: ``name``, ``fingerprint``.
            A model in memory is whole and has none.

    Raises:
        InvalidOptionError: lists of a wrong length, a size out of range, or head counts that do not divide.
    """

    model_type = "mambify"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a list)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    layer_mixers: list[str] | None = None
    conv_kernel: int = 4
    mamba1_state_size: int = 16
    mamba1_dt_rank: int | None = None
    cut_from: list[int] | None = None
    draft_vocabulary: int | None = None
    draft_features: bool = False
    ssm_inner_size: int | None = None
    ssm_state_size: int | None = None
    ssm_dt_rank: int | None = None
    ssm_num_heads: int | None = None
    ssm_num_groups: int | None = None
    ssm_proj_bias: bool = False
    ssm_conv_bias: bool = True
    ssm_dt_min: float = 0.0
    ssm_dt_max: float | None = None
    residual_in_fp32: bool = False
    ops_backend: str = "auto"
    teacher_family: str = ""
    teacher: str = ""
    teacher_hub_id: str = ""
    teacher_license: dict[str, str] | None = None
    base: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidOptionError(f"{name} is {value}: it has to be at least {least}")
        if self.draft_vocabulary is not None and not 1 <= self.draft_vocabulary <= self.vocab_size:
            raise InvalidOptionError(
                f"a draft's head can know 1 to {self.vocab_size} words, not {self.draft_vocabulary}"
            )
        if self.draft_vocabulary is not None and self.tie_word_embeddings:
            raise InvalidOptionError("a head that knows part of the vocabulary cannot be tied to the embeddings")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mamba1_dt_rank is None:
            self.mamba1_dt_rank = -(-self.hidden_size // 16)
        if self.layer_mixers is None:
            self.layer_mixers = [ATTENTION] * self.num_hidden_layers
        if self.layer_types is None:
            kept = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kept] * self.num_hidden_layers
        for name in ("layer_mixers", "layer_types"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise InvalidOptionError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InvalidOptionError(
                f"{self.num_attention_heads} query heads are not a multiple of "
                f"{self.num_key_value_heads} key/value heads"
            )
        for whole, part in (("ssm_inner_size", "ssm_num_heads"), ("ssm_num_heads", "ssm_num_groups")):
            if (getattr(self, whole) or 0) % (getattr(self, part) or 1):
                raise InvalidOptionError(
                    f"{whole} is {getattr(self, whole)}: it has to be a multiple of {part}, {getattr(self, part)}"
                )
        self.layer_types = [
            kind if mixer == ATTENTION else LINEAR
            for kind, mixer in zip(self.layer_types, self.layer_mixers, strict=True)
        ]
        super().__post_init__(**kwargs)

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that keep attention."""
        return [i for i, mixer in enumerate(self.layer_mixers or []) if mixer == ATTENTION]

    @property
    def converted_layers(self) -> list[int]:
        """Indices of the layers whose attention was replaced, or which never had any."""
        return [i for i, mixer in enumerate(self.layer_mixers or []) if mixer != ATTENTION]

    @property
    def stock_layers(self) -> list[int]:
        """Indices of the layers that are Mamba in the checkpoint they were read from, as it is published."""
        return [i for i, mixer in enumerate(self.layer_mixers or []) if mixer.startswith(STOCK)]
