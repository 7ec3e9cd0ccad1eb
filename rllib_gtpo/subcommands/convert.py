"""`rllib convert`: tool traces as demonstrations."""

from __future__ import annotations

import argparse

from rllib_gtpo.subcommands.options import Commands, add_command, add_paths


def add_to(commands: Commands) -> None:
    """Adds `rllib convert`."""
    parser = add_command(
        commands,
        "convert",
        help="make demonstrations for a cold start from tool traces",
        description="Convert tool traces (.jsonl, .json, .parquet) to the JSON lines that\n"
        "cold_start.data takes.  Rows that cannot be used are left out and counted.",
        examples="examples:\n  rllib convert traces.jsonl demonstrations.jsonl --from sharegpt\n",
    )
    add_paths(parser, "IN", "OUT")
    parser.add_argument("--from", dest="kind", required=True, choices=("openhands", "sharegpt"))
    parser.add_argument(
        "--keep-failed",
        action="store_true",
        help="also traces that say of themselves that they failed (resolved, success, correct)",
    )
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.convert import convert

    print(convert(args.source, args.target, args.kind, keep_failed=args.keep_failed))
    return 0
