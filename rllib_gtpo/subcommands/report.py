"""`rllib report`: why turns got the credit that they got."""

from __future__ import annotations

import argparse
from pathlib import Path

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.subcommands.options import Commands, add_command

EXAMPLES = """\
examples:
  rllib report runs/four
  rllib report s3://bucket/records/four --out four.html
  rllib report runs/four --terminal | less -R
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib report`."""
    parser = add_command(
        commands,
        "report",
        help="show why turns got the credit that they got",
        description="Write one HTML file, which needs no network: a run's learning curves, its\n"
        "recorded groups turn by turn, and what other estimators would have said of them.\n"
        "Of a sweep: the table of its trials, and sweep.html.",
        examples=EXAMPLES,
    )
    parser.add_argument("source", metavar="RUN|CHECKPOINT|SWEEP", help="a directory, or s3://...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.add_argument("--terminal", action="store_true", help="print the main things instead")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.quiet import silence

    silence()
    from rllib_gtpo.report import build_report, print_report
    from rllib_gtpo.report.sweep import is_sweep_directory, summarise

    if is_sweep_directory(args.source):
        if args.out is not None:
            raise ConfigError(f"{args.source} is a sweep, whose files it holds: leave out --out.")
        summarise(Path(args.source)).show()
        return 0
    if args.terminal and args.out is not None:
        raise ConfigError("--out names the HTML file: leave out --terminal, or --out.")
    if args.terminal:
        print_report(args.source)
    else:
        print(build_report(args.source, args.out))
    return 0
