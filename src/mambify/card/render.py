"""The model card of a student: what it is, how it was made, how it scored, how to load it.

Only what is known is said. A training, a licence or a figure that nobody recorded is left out, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mambify.card.results import acceptance_section, results_section
from mambify.card.text import table, without_way
from mambify.config import STOCK, HybridConfig
from mambify.layer_map import kinds_of_layers, legend, name, plain_map, ranges
from mambify.provenance import Provenance

CARD = "README.md"


def render_card(
    config: HybridConfig, provenance: Provenance | None = None, *, use: str | None = None, limits: Sequence[str] = ()
) -> str:
    """The card of the model that ``config`` describes, as Markdown with the Hub's YAML header.

    Args:
        config: with ``base`` set, the card of a directory that holds mixers only.
        provenance: how the model came to be; ``None`` where nothing is recorded.
        use: how the model is loaded, of one that is stored in another form than ours.
        limits: sentences that belong to that form.
    """
    sections = [
        _header(config, provenance),
        f"# {_title(config, provenance)}\n\n{_what_it_is(config, provenance)}",
        f"## Layers\n\n{_layers(config)}",
        f"## Use\n\n{_use(config, provenance) if use is None else use}",
    ]
    if provenance is not None and (provenance.stages or provenance.recipe):
        sections.append(f"## Training\n\n{_training(provenance)}")
    results = {} if provenance is None else provenance.results
    if any(kind != "acceptance" for kind in results):
        sections.append(f"## Results\n\n{results_section(results)}")
    if "acceptance" in results:
        sections.append(f"## Acceptance\n\n{acceptance_section(results['acceptance'])}")
    limits = [*_limit_lines(config, provenance), *limits]
    sections.append("## Limits\n\n" + "\n".join(f"- {line}" for line in limits))
    return "\n\n".join(sections) + "\n"


def _header(config: HybridConfig, provenance: Provenance | None) -> str:
    trained = provenance is not None and bool(provenance.stages)
    mixers = sorted({kind.removeprefix(STOCK) for kind in config.layer_mixers or () if kind != "attention"})
    fields: dict[str, Any] = dict(config.teacher_license or {})
    if config.teacher_hub_id:
        fields["base_model"] = config.teacher_hub_id
    fields["library_name"] = "transformers"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = [
        "mambify",
        *(["hybrid"] if mixers and not config.stock_layers else []),
        *mixers,
        *(["distillation"] if trained else []),
    ]
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def _teacher(config: HybridConfig) -> str:
    """The teacher's name for people: its Hub id, or what it was loaded by without the way there."""
    return config.teacher_hub_id or (
        Path(config.teacher).name if Path(config.teacher).is_absolute() else config.teacher
    )


def _target(config: HybridConfig, provenance: Provenance | None) -> str | None:
    """The one model that a draft runs beside, as it was called in training; ``None`` where it fits others, too."""
    recipe = {} if provenance is None else provenance.recipe
    return without_way(recipe["teacher"]) if config.draft_features and "teacher" in recipe else None


def _title(config: HybridConfig, provenance: Provenance | None) -> str:
    teacher = _teacher(config).rpartition("/")[2] or "A hybrid model"
    if config.cut_from is not None:
        return f"A draft for {_target(config, provenance) or teacher}, of {config.num_hidden_layers} layers"
    if not config.converted_layers or config.stock_layers:
        return teacher
    mixers = " and ".join(sorted({name(kind) for kind in config.layer_mixers or () if kind != "attention"}))
    return f"{teacher}, {len(config.converted_layers)} of {config.num_hidden_layers} layers as {mixers}"


def _what_it_is(config: HybridConfig, provenance: Provenance | None) -> str:
    teacher = _teacher(config)
    linked = f"[{teacher}](https://huggingface.co/{teacher})" if config.teacher_hub_id else teacher or "a Transformer"
    if config.cut_from is not None:
        return _what_a_draft_is(config, linked, _target(config, provenance))
    if not config.converted_layers or config.stock_layers:
        return f"The weights of {linked}, as mambify saves them; no layer is converted."
    read_as = without_way(config.teacher)
    loaded_as = f" (read as `{read_as}`)" if read_as not in ("", teacher) else ""
    lines = (
        f"A hybrid of attention and Mamba layers made from {linked}{loaded_as} with mambify, by the method of "
        "[The Mamba in the Llama](https://arxiv.org/abs/2408.15237): some attention layers are replaced by Mamba "
        "mixers, everything else is kept from the teacher. A converted layer carries a state of fixed size instead of "
        "keys and values that grow with the text."
    )
    return lines + _on_its_base(config)


def _what_a_draft_is(config: HybridConfig, linked: str, target: str | None) -> str:
    assert config.cut_from is not None
    beside = f"{linked}, or with a hybrid made from it" if target is None else f"`{target}`, made from {linked}"
    lines = (
        f"A draft for speculative decoding with {beside}: layers {ranges(config.cut_from)} of it, with its embeddings. "
        "It guesses tokens, which the large model reads all at once and keeps or refuses; what comes out is the large "
        "model's own."
    )
    if config.draft_vocabulary is not None:
        lines += (
            f" Its head knows {config.draft_vocabulary:,} of {config.vocab_size:,} words; all others have a "
            "probability of zero."
        )
    if config.draft_features:
        lines += (
            " Beside the tokens it reads the large model's last hidden states (after "
            "[EAGLE](https://arxiv.org/abs/2401.15077)), so it runs beside that model only."
        )
    return lines + _on_its_base(config)


def _on_its_base(config: HybridConfig) -> str:
    if config.base is None:
        return ""
    return (
        f"\n\nThis directory holds only the weights that are not the teacher's. On loading they are put into "
        f"`{_base_name(config)}`, whose kept weights are checked against a fingerprint."
    )


def _base_name(config: HybridConfig) -> str:
    assert config.base is not None
    return without_way(config.base["name"])


def _layers(config: HybridConfig) -> str:
    kinds = kinds_of_layers(config)
    if config.stock_layers:
        rows = [
            ("hidden size, inner size", f"{config.hidden_size:,}, {config.ssm_inner_size:,}"),
            ("state size", f"{config.ssm_state_size:,}"),
            ("vocabulary", f"{config.vocab_size:,}"),
        ]
    else:
        rows = [
            ("layers that keep attention", ranges(config.attention_layers)),
            ("layers converted", ranges(config.converted_layers)),
            ("hidden size, feed-forward size", f"{config.hidden_size:,}, {config.intermediate_size:,}"),
            (
                "heads (query, key/value, dimension)",
                f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
            ),
            ("vocabulary", f"{config.vocab_size:,}"),
            ("positions of the teacher", f"{config.max_position_embeddings:,}"),
        ]
    return f"```\n{plain_map(kinds)}\n{legend(kinds)}\n```\n\n" + table(("", ""), rows)


def _use(config: HybridConfig, provenance: Provenance | None) -> str:
    base = "" if config.base is None else f" and the base model `{_base_name(config)}`"
    command = "mambify chat PATH_OR_HUB_ID"
    if config.cut_from is not None:
        command = f"mambify chat {_target(config, provenance) or _teacher(config) or 'TARGET'} --draft PATH_OR_HUB_ID"
    return f"""With `pip install mambify`{base}:

```python
import mambify

loaded = mambify.load("PATH_OR_HUB_ID")
loaded.model, loaded.tokenizer
```

or with transformers alone, mambify being installed:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True)
```

or on the command line: `{command}`."""


def _training(provenance: Provenance) -> str:
    recipe = provenance.recipe
    parts = []
    if provenance.stages:
        rows = [
            (
                stage["stage"],
                f"{stage['attention']:.1%}" if "attention" in stage else "",
                f"{stage['steps']:,}" if "steps" in stage else "",
                f"{stage['tokens']:,}",
                f"{stage['seconds']:,.0f}" if "seconds" in stage else "",
            )
            for stage in provenance.stages
        ]
        parts.append(table(("stage", "layers with attention", "steps", "tokens", "seconds"), rows))
        parts.append(f"In all {provenance.tokens:,} tokens.")
    made = [
        f"{key} {provenance.environment[key]}"
        for key in ("device", "mambify", "torch", "transformers")
        if provenance.environment.get(key)
    ]
    if made:
        parts.append(f"Made with {', '.join(made)}.")
    if recipe:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
        parts.append(f"<details><summary>The recipe</summary>\n\n```yaml\n{text}\n```\n\n</details>")
    return "\n\n".join(parts)


def _limit_lines(config: HybridConfig, provenance: Provenance | None) -> Iterator[str]:
    if config.cut_from is not None:
        yield "By itself it is of no use: it is trained to guess what a large model says next, not to be right."
        return
    yield "It knows what its teacher knows, and has its teacher's errors and biases."
    if not config.converted_layers:
        return
    if provenance is None or not provenance.stages:
        yield "No training is recorded: a model that was converted and not distilled does not speak sensibly."
    elif length := provenance.recipe.get("data", {}).get("context_length"):
        yield f"It was trained on sequences of {length:,} tokens; longer text was not part of the training."
    yield (
        "A state of fixed size cannot hold everything: the fewer layers keep attention, the weaker is exact recall of "
        "details from far back."
    )
    if provenance is None or not provenance.results:
        yield "No evaluation is recorded."
    else:
        yield "What the table above does not measure was not measured."
