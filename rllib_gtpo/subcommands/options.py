"""What several subcommands share: parsers with examples, options, types of arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rllib_gtpo.errors import ConfigError, did_you_mean

EXIT_CODES = """\
exit codes:
  0  done            1  failed while training     2  bad input (file, option, setting)
  3  the last checkpoint could not be saved     130, 143  interrupted (Ctrl-C, SIGTERM)
  141  the reader of the output went away
"""

Commands = Any  # argparse's own class of subparsers is private


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistyped command, choice or option is told the nearest one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            message = f"unknown: {value!r}{did_you_mean(value, action.choices)}"
            raise argparse.ArgumentError(action, message)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends the program: nobody knows these arguments."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        wrong = unknown[0]
        advice = did_you_mean(wrong.split("=")[0], options) if wrong.startswith("-") else ""
        self.error(f"unexpected argument {wrong!r}{advice}")


def add_command(
    commands: Commands,
    name: str,
    *,
    help: str,
    description: str = "",
    examples: str = "",
    usage: str | None = None,
) -> Parser:
    """A parser whose help ends with examples and exit codes as they are written."""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        usage=usage,
        description=description or help,
        epilog="\n".join([*([examples] if examples else []), EXIT_CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)  # whose usage goes with what is wrong
    return parser


def add_override(parser: argparse.ArgumentParser) -> None:
    """`--override`, of the commands that take an experiment file."""
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, also a nested one: env_config.max_ops=4 (repeatable)",
    )


def add_session(parser: argparse.ArgumentParser) -> None:
    """Where a command that computes has its Ray, and what it shows; see `session_options`."""
    add = parser.add_argument
    add("--num-cpus", type=count, metavar="N", help="CPUs that Ray may count on (default: all)")
    add("--num-gpus", type=count, metavar="N", help="GPUs that Ray may count on (default: all)")
    add("--ray-address", metavar="ADDRESS", help="connect to a running Ray cluster")
    add("--debug", action="store_true", help="show all messages, and tracebacks of bad input")


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_session`, by the names of `ray_session.SessionOptions`.

    Raises:
        ConfigError: They contradict each other.
    """
    if args.ray_address and (args.num_cpus is not None or args.num_gpus is not None):
        raise ConfigError(
            "--num-cpus and --num-gpus are of a Ray that is started here: leave out "
            "them or --ray-address"
        )
    return {name: getattr(args, name) for name in ("num_cpus", "num_gpus", "ray_address", "debug")}


def add_paths(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    """What a command reads and what it makes, by the names that its help gives them."""
    for name, shown in (("source", source), ("target", target)):
        parser.add_argument(name, type=Path, metavar=shown)


def count(text: str) -> int:
    """A whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def minutes(text: str) -> float:
    """A number of at least 0."""
    number = float(text)
    if not number >= 0.0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


for _type in (count, minutes, positive):
    _type.__name__ = "number"  # argparse names the type in its messages


def spin_briefly() -> None:
    """For commands that compute: waiting OpenMP threads give their core away.

    By default they spin for so long that small models train tens of times slower as soon as another
    process wants a core.  Read when torch is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
