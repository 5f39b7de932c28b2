"""A Modelfile, with which Ollama takes a GGUF file in: the turns of a chat in Go's template language, where they stop,
and the system message of conversations that bring none.

Ollama does not run the Jinja template that stands in the GGUF file. What the template makes of a probe conversation is
compared with formats that are known here; one that is none of them is left to Ollama, which knows some by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_SYSTEM = "Probe system."
_PROBE = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "Probe question."}]


@dataclass(frozen=True)
class _Turns:
    """A known chat format.

    Attributes:
        rendered: what it makes of the probe, without the token that begins every text.
        template: the same for Ollama.
        stop: the token that ends an answer.
    """

    rendered: str
    template: str
    stop: str

    @property
    def around_system(self) -> tuple[str, str]:
        """What it puts before a system message, and all that comes behind it in the probe."""
        before, _, behind = self.rendered.partition(_SYSTEM)
        return before, behind


_KNOWN: Mapping[str, _Turns] = {
    "ChatML": _Turns(
        "<|im_start|>system\nProbe system.<|im_end|>\n<|im_start|>user\nProbe question.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n",
        "<|im_end|>",
    ),
    "Zephyr": _Turns(
        "<|system|>\nProbe system.</s>\n<|user|>\nProbe question.</s>\n<|assistant|>\n",
        "{{ if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}"
        "{{ if .Prompt }}<|user|>\n{{ .Prompt }}</s>\n{{ end }}"
        "<|assistant|>\n{{ .Response }}</s>\n",
        "</s>",
    ),
    "Llama 3": _Turns(
        "<|start_header_id|>system<|end_header_id|>\n\nProbe system.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nProbe question.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
        "{{ if .Prompt }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>",
        "<|eot_id|>",
    ),
}


def modelfile(gguf: Path, tokenizer: PreTrainedTokenizerBase, context_length: int) -> str:
    """The Modelfile for ``gguf``, which has to lie beside it."""
    lines = [f"FROM ./{gguf.name}", f"PARAMETER num_ctx {context_length}"]
    known = _known_turns(tokenizer)
    if known is not None:
        lines += [f'TEMPLATE """{known.template}"""', f"PARAMETER stop {json.dumps(known.stop)}"]
        system = _default_system(tokenizer, known)
        lines += [f'SYSTEM """{system}"""'] if system else []
    elif tokenizer.chat_template is not None:
        lines.append(f"# The chat template is none of {', '.join(_KNOWN)}: say it here in Ollama's TEMPLATE.")
    return "\n".join(lines) + "\n"


def _known_turns(tokenizer: PreTrainedTokenizerBase) -> _Turns | None:
    if tokenizer.chat_template is None:
        return None
    try:
        text = _rendered(tokenizer, _PROBE)
    except TemplateError:
        return None  # it takes no system message, say: none of the known ones
    return next((turns for turns in _KNOWN.values() if turns.rendered == text), None)


def _default_system(tokenizer: PreTrainedTokenizerBase, turns: _Turns) -> str:
    """What the template says for a system message where a conversation has none; "" for nothing."""
    before, behind = turns.around_system
    text = _rendered(tokenizer, _PROBE[1:])
    return text[len(before) : -len(behind)] if text.startswith(before) and text.endswith(behind) else ""


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Without the token that begins every text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    known = any(text.startswith(turns.around_system[0]) for turns in _KNOWN.values())
    return text if known else text.removeprefix(tokenizer.bos_token or "")
