"""Running a model: drawing the next token, token ids from token ids, text from text."""

from __future__ import annotations

from mambify.decode.conversation import Conversation
from mambify.decode.generate import generate
from mambify.decode.sampling import Sampling
from mambify.decode.speculative import speculator
from mambify.decode.stream import TextStream, generate_text, stream_text
from mambify.decode.text import Detokenizer, Message, encode_prompt, stop_ids

__all__ = [
    "Conversation",
    "Detokenizer",
    "Message",
    "Sampling",
    "TextStream",
    "encode_prompt",
    "generate",
    "generate_text",
    "speculator",
    "stop_ids",
    "stream_text",
]
