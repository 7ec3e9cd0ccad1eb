"""Messages to token ids and back, exactly and incrementally; tool-call formats."""

from rllib_gtpo.chat.codec import ChatCodec
from rllib_gtpo.chat.formats import (
    CallFormat,
    FencedFormat,
    GlmFormat,
    HermesFormat,
    Llama3Format,
    MistralFormat,
    ParsedTurn,
    Qwen3CoderFormat,
    call_format,
    register_call_format,
)

__all__ = [
    "CallFormat",
    "ChatCodec",
    "FencedFormat",
    "GlmFormat",
    "HermesFormat",
    "Llama3Format",
    "MistralFormat",
    "ParsedTurn",
    "Qwen3CoderFormat",
    "call_format",
    "register_call_format",
]
