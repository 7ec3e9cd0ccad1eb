"""The `rllib` command: its parser, made of subcommands, and dispatch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.subcommands import IN_ORDER_OF_HELP
from rllib_gtpo.subcommands.options import EXIT_CODES, Parser
from rllib_gtpo.subcommands.train import words_of

EXAMPLES = """\
examples:
  rllib example list
  rllib train file tuned_examples/gtpo_calculator.py --stop training_iteration=5
  rllib report runs/NAME

`rllib COMMAND --help` says more.
"""


class _Rllib(Parser):
    """Also `rllib train --algo NAME`, where a word is missing for argparse."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = words_of(sys.argv[1:] if args is None else args)
        return super().parse_known_args(words, namespace)


def build_parser() -> Parser:
    """The whole command line."""
    parser = _Rllib(
        prog="rllib",
        description="Train any RLlib algorithm, and LLM tool agents with GTPO.",
        epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for subcommand in IN_ORDER_OF_HELP:
        subcommand.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from rllib_gtpo.command.failures import guarded
    from rllib_gtpo.command.streams import take_any_text

    words = sys.argv[1:] if argv is None else argv
    take_any_text()
    return guarded(lambda: _run(words), debug="--debug" in words)


def _run(words: Sequence[str]) -> int:
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        getattr(args, "parser", parser).refuse(unknown)
    if args.version:
        return _version()
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    return int(args.run(args))


def _version() -> int:
    from importlib import metadata

    for package in ("rllib-gtpo", "ray", "torch", "transformers"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
