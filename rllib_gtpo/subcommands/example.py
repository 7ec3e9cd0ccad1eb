"""`rllib example`: the tuned examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from rllib_gtpo.subcommands.options import Commands, add_command
from rllib_gtpo.subcommands.train import add_run_options, train

EXAMPLES = """\
examples:
  rllib example list
  rllib example get gtpo_calculator task.py
  rllib example run ppo_cartpole --stop training_iteration=3
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib example`."""
    example = add_command(
        commands,
        "example",
        help="list, copy or train the tuned examples",
        examples=EXAMPLES,
    )
    actions = example.add_subparsers(dest="action", metavar="list|get|run", required=True)
    add_command(actions, "list", help="list the tuned examples").set_defaults(run=_list)
    get = add_command(
        actions,
        "get",
        help="copy an example, to change it",
        description="Copy an example, and print the command that trains the copy.",
        examples=EXAMPLES,
    )
    run = add_command(
        actions,
        "run",
        help="train an example",
        description="Train an example as it is; the options are those of `rllib train file`.",
        examples=EXAMPLES,
    )
    for parser, function in ((get, _get), (run, _run)):
        parser.add_argument(
            "name", metavar="NAME", help="as listed, with or without folder and ending"
        )
        parser.set_defaults(run=function)
    get.add_argument(
        "target",
        type=Path,
        nargs="?",
        default=Path("."),
        metavar="FILE|DIR",
        help="where to (default: here)",
    )
    add_run_options(run)


def _list(_args: argparse.Namespace) -> int:
    from rllib_gtpo.command.examples import list_examples

    list_examples()
    return 0


def _get(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.examples import get_example

    get_example(args.name, args.target)
    return 0


def _run(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.examples import find_example

    return train(find_example(args.name), args)
