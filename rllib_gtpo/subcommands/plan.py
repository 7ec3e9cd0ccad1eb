"""`rllib plan`: memory and time of a run before it starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from rllib_gtpo.subcommands.options import (
    Commands,
    add_command,
    add_override,
    count,
    positive,
    spin_briefly,
)

EXAMPLES = """\
examples:
  rllib plan task.yaml
  rllib plan task.yaml --override num_learners=4 --memory 80
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib plan`."""
    parser = add_command(
        commands,
        "plan",
        help="say what memory and time a run needs, and whether it fits",
        description="Print the memory of each worker of what FILE describes, by what it is needed\n"
        "for, and the time of an iteration, from a probe of a few seconds.  Exit code 2, with\n"
        "what to change, if it cannot fit.  Nothing is trained, and no weights are loaded.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="as for `rllib train file`")
    add_override(parser)
    add(
        "--memory",
        type=positive,
        metavar="GIB",
        help="of each GPU, or of the machine if no worker has one (default: those of this machine)",
    )
    add(
        "--tokens",
        type=count,
        metavar="N",
        help="mean length of a trajectory, for the time (default: as long as the settings allow)",
    )
    add("--json", action="store_true", help="print JSON; sizes in bytes")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    spin_briefly()
    from rllib_gtpo.command.plan import plan_file

    return plan_file(
        args.file,
        args.override,
        memory_gib=args.memory,
        tokens=args.tokens,
        as_json=args.json,
    )
