"""``mambify info``: what a model is, read from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mambify.cli import options
from mambify.cli.console import print_json, quiet_libraries, stdout

if TYPE_CHECKING:
    from mambify.families.sources import Source

EXAMPLE = "mambify info smollm2"


def info(model: options.Model, json: options.Json = False) -> None:
    """Say what a model is: layers, parameters, memory.

    Only the configuration is read, so it answers for models that do not fit this machine.
    """
    quiet_libraries()
    from mambify.cli.plans import describe_model
    from mambify.families.checkpoint import open_checkpoint
    from mambify.families.sources import resolve

    where = resolve(model)
    config = open_checkpoint(where).config
    facts: dict[str, Any] = {"model": model} | describe_model(config)
    facts["base"] = None if config.base is None else config.base["name"]
    facts["tokenizer"] = _tokenizer_facts(where)
    if json:
        print_json(facts)
    else:
        _show(facts)


def _tokenizer_facts(where: Source) -> dict[str, Any] | None:
    """What the tokenizer is like; None where there is none, or where reading it takes seconds (GGUF)."""
    from mambify.families.load import load_tokenizer

    tokenizer = None if where.gguf is not None else load_tokenizer(where)
    if tokenizer is None:
        return None
    return {
        "num_tokens": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": bool(tokenizer.chat_template),
    }


def _show(facts: dict[str, Any]) -> None:
    from mambify.cli.plans import bytes_table, facts_table, layer_map
    from mambify.evaluate.report.quantities import compact

    converted = sum(kind.startswith("mamba") for kind in facts["layers"])
    table = facts_table()
    table.add_row("model", facts["model"])
    hybrid = f"hybrid, {converted} of {facts['num_layers']} layers converted, from the {facts['family']} family"
    whole = "pure Mamba" if facts["pure_mamba"] else "Transformer"
    table.add_row("kind", hybrid if converted else f"{whole} of the {facts['family']} family")
    if facts["base"] is not None:
        table.add_row("weights", f"of the mixers only; the others are those of {facts['base']}")
    table.add_row("layers", layer_map(facts["layers"]))
    table.add_row("parameters", f"{compact(facts['parameters'])} ({facts['dtype']})")
    if (pure := facts["pure_mamba"]) is not None:
        table.add_row("hidden size", f"{facts['hidden_size']}, inner {pure['inner_size']}, no feed-forward")
        groups = f"; {pure['num_heads']} heads in {pure['num_groups']} groups" if pure["num_heads"] else ""
        table.add_row("state", f"{pure['state_size']} a channel{groups}")
    else:
        table.add_row("hidden size", f"{facts['hidden_size']}, feed-forward {facts['intermediate_size']}")
        table.add_row(
            "heads",
            f"{facts['num_attention_heads']} query, {facts['num_key_value_heads']} key/value, of {facts['head_dim']}",
        )
    if facts["sliding_window"]:
        table.add_row("window", f"{facts['sliding_window']} tokens")
    table.add_row("positions", f"{facts['max_position_embeddings']:,}")
    tied = "tied to the output" if facts["tied_embeddings"] else "apart from the output"
    table.add_row("vocabulary", f"{facts['vocab_size']:,} tokens, embeddings {tied}")
    if (tokenizer := facts["tokenizer"]) is not None:
        template = "a chat template" if tokenizer["chat_template"] else "no chat template"
        table.add_row("tokenizer", f"begins {tokenizer['bos_token']}, ends {tokenizer['eos_token']}, {template}")
    console = stdout()
    console.print(table)
    console.print(bytes_table(facts["state_bytes"]))
