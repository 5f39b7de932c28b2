"""What ``info`` and ``convert`` say about a model before any weight is read: layers, parameters, bytes a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mambify.config import HybridConfig
    from mambify.conversion import ConversionPlan


def describe_model(config: HybridConfig) -> dict[str, Any]:
    """The facts of a configuration as plain JSON values."""
    from mambify.conversion import count_parameters, plan
    from mambify.layer_map import kinds_of_layers

    parameters = count_parameters(plan(config, attention=1.0)).total
    return {
        "family": config.teacher_family,
        "num_layers": config.num_hidden_layers,
        "layers": kinds_of_layers(config),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "tied_embeddings": config.tie_word_embeddings,
        "dtype": _dtype_name(config),
        "parameters": parameters,
        "pure_mamba": _pure_mamba(config),
        "state_bytes": sequence_bytes(config),
    }


def _pure_mamba(config: HybridConfig) -> dict[str, int | None] | None:
    """Sizes that only a pure Mamba model has; None for others."""
    if not config.stock_layers:
        return None
    names = ("inner_size", "state_size", "num_heads", "num_groups", "dt_rank")
    return {name: getattr(config, f"ssm_{name}") for name in names}


def describe_plan(planned: ConversionPlan) -> dict[str, Any]:
    """A conversion as plain JSON values."""
    from mambify.conversion import count_parameters, plan
    from mambify.layer_map import kinds_of_layers

    count = count_parameters(planned)
    trained = count_parameters(replace(planned, converted=tuple(planned.student.converted_layers))).new
    return {
        "layers": kinds_of_layers(planned.student),
        "attention_layers": planned.student.attention_layers,
        "converted_layers": list(planned.converted),
        "init": planned.init,
        "dtype": _dtype_name(planned.teacher),
        "parameters": {"total": count.total, "kept": count.kept, "new": count.new, "trained": trained},
        "teacher_parameters": count_parameters(plan(planned.teacher, attention=1.0)).total,
        "state_bytes": sequence_bytes(planned.student),
        "teacher_state_bytes": sequence_bytes(planned.teacher),
    }


def sequence_bytes(config: HybridConfig) -> dict[str, int]:
    """Context length → bytes of keys, values and recurrent states that one sequence of it holds."""
    from mambify.conversion import state_bytes
    from mambify.conversion.plan import CONTEXTS

    return {str(context): state_bytes(config, context) for context in CONTEXTS}


def layer_map(kinds: Sequence[str]) -> Text:
    """One letter a layer, eight to a group, with a legend."""
    from mambify.layer_map import gap_before, legend, letter

    text = Text()
    for index, kind in enumerate(kinds):
        text.append(gap_before(index))
        text.append(letter(kind), style="bold" if kind in ("attention", "sliding") else "cyan")
    text.append(f"\n{legend(kinds)}", style="dim")
    return text


def bytes_table(student: dict[str, int], teacher: dict[str, int] | None = None) -> Table:
    """Bytes a sequence by context length; beside the teacher's where given."""
    from mambify.evaluate.report.quantities import memory, tokens_of_context

    table = Table(title="memory of one sequence", title_justify="left")
    table.add_column("context")
    if teacher is not None:
        table.add_column("teacher", justify="right")
    table.add_column("student" if teacher is not None else "bytes", justify="right")
    if teacher is not None:
        table.add_column("share", justify="right")
    for context, size in student.items():
        cells = [f"{tokens_of_context(int(context))} tokens"]
        if teacher is not None:
            cells.append(memory(teacher[context]))
        cells.append(memory(size))
        if teacher is not None:
            cells.append(f"{size / teacher[context]:.1%}" if teacher[context] else "–")
        table.add_row(*cells)
    return table


def facts_table() -> Table:
    """Two columns without lines: a name and what it is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table


def _dtype_name(config: HybridConfig) -> str:
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")
