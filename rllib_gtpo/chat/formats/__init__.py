"""How policies write tool calls: one module for each family, and a registry."""

from rllib_gtpo.chat.formats.auto import AutoFormat, native_format
from rllib_gtpo.chat.formats.base import (
    THINKING,
    CallFormat,
    ParsedTurn,
    call_format,
    call_formats,
    register_call_format,
)
from rllib_gtpo.chat.formats.fenced import FencedFormat
from rllib_gtpo.chat.formats.hermes import HermesFormat
from rllib_gtpo.chat.formats.llama3 import Llama3Format
from rllib_gtpo.chat.formats.mistral import MistralArgsFormat, MistralFormat
from rllib_gtpo.chat.formats.response import ResponseFormat
from rllib_gtpo.chat.formats.xml import GlmFormat, Qwen3CoderFormat

__all__ = [
    "THINKING",
    "AutoFormat",
    "CallFormat",
    "FencedFormat",
    "GlmFormat",
    "HermesFormat",
    "Llama3Format",
    "MistralArgsFormat",
    "MistralFormat",
    "ParsedTurn",
    "Qwen3CoderFormat",
    "ResponseFormat",
    "call_format",
    "call_formats",
    "native_format",
    "register_call_format",
]
