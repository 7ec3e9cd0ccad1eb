"""`python -m rllib_gtpo.chat check SOURCE...`: how templates are handled, as a Markdown table.

A source is a template's file (.jinja), a model's directory, or a hub id.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rllib_gtpo.chat.codec import ChatCodec
from rllib_gtpo.chat.formats import native_format
from rllib_gtpo.errors import ChatTemplateError, ConfigError

HEADER = (
    "| template | tools | results go as | writes calls as | a turn ends with "
    "| a whole rendering differs in |\n"
    "|---|---|---|---|---|---|"
)
# What looks like a special token in a template's text.
_MARKERS = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>"  # noqa: RUF001
    r"|<(?:start|end)_of_[a-z]+>|\[gMASK\]|<sop>|</s>|\[/?[A-Z]+(?:_[A-Z]+)*\]"
)


def tokenizer_for(template: str) -> Any:
    """A tokenizer for a template that comes without one: its markers are special tokens of it."""
    from rllib_gtpo.models import build_tokenizer

    tokenizer = build_tokenizer()
    markers = sorted(set(_MARKERS.findall(template)) - set(tokenizer.all_special_tokens))
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "eos_token": "<eos>", "extra_special_tokens": markers}
    )
    tokenizer.chat_template = template
    return tokenizer


def row(name: str, codec: ChatCodec) -> str:
    """A template's row of the table."""
    template = codec.template
    native = native_format(template)
    if native is not None:
        calls = f"`{native.name}`"
    else:
        calls = "a way of its own" if template.writes_calls else "text only"
    results = template.shape.results.value + (", in parts" if template.shape.parts else "")
    ends = ", ".join(f"`{end}`" for end in template.ends).replace("|", "\\|")
    differs = ", ".join(codec.deviations) or "nothing"
    tools = "shown" if template.shows_tools else "not shown"
    return f"| {name} | {tools} | {results} | {calls} | {ends} | {differs} |"


def load(source: str) -> ChatCodec:
    """The codec of a template's file or a model, in the format that asks nothing of a template."""
    if source.endswith(".jinja"):
        tokenizer = tokenizer_for(Path(source).read_text(encoding="utf-8"))
    else:
        from rllib_gtpo.models import load_tokenizer

        tokenizer = load_tokenizer(source)
    return ChatCodec(tokenizer, "fenced")


def check(sources: Sequence[str]) -> int:
    """Prints the table; 1 if any source is refused."""
    print(HEADER)
    refused = 0
    for source in sources:
        name = Path(source).stem if source.endswith(".jinja") else source
        try:
            print(row(name, load(source)))
        except (ChatTemplateError, ConfigError, OSError) as error:
            refused += 1
            reason = " ".join(str(error).split()).replace("|", "\\|")
            print(f"| {name} | refused: {reason} | | | | |")
    return 1 if refused else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rllib_gtpo.chat", description=__doc__)
    commands = parser.add_subparsers(required=True)
    checks = commands.add_parser("check", help="how chat templates are handled")
    checks.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="FILE.jinja, directory, hub id"
    )
    return check(parser.parse_args(arguments).sources)


if __name__ == "__main__":
    sys.exit(main())
