"""`rllib example`: the tuned examples."""

from __future__ import annotations

import argparse

from rllib_gtpo.subcommands.options import Commands, add_command


def add_to(commands: Commands) -> None:
    """Adds `rllib example`."""
    example = add_command(commands, "example", help="tuned examples")
    actions = example.add_subparsers(dest="action", metavar="list", required=True)
    add_command(actions, "list", help="list the tuned examples").set_defaults(run=_list)


def _list(_args: argparse.Namespace) -> int:
    from rllib_gtpo.command.examples import list_examples

    return list_examples()
