"""Running a model: token ids from token ids, text from text."""

from __future__ import annotations

from mambify.decode.conversation import Conversation
from mambify.decode.decoder import decoder_for, speculator
from mambify.decode.detokenizer import Detokenizer
from mambify.decode.generate import generate
from mambify.decode.session import Session
from mambify.decode.speed import Speed
from mambify.decode.stop import Cutter, stop_strings
from mambify.decode.stream import TextStream, stream, stream_tokens
from mambify.decode.text import Message, encode_prompt
from mambify.engine import Sampling
from mambify.language_model import stop_ids

__all__ = [
    "Conversation",
    "Cutter",
    "Detokenizer",
    "Message",
    "Sampling",
    "Session",
    "Speed",
    "TextStream",
    "decoder_for",
    "encode_prompt",
    "generate",
    "speculator",
    "stop_ids",
    "stop_strings",
    "stream",
    "stream_tokens",
]
