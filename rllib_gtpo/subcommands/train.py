"""`rllib train`: arguments of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.subcommands.options import (
    Commands,
    add_command,
    add_override,
    add_session,
    count,
    minutes,
    session_options,
    spin_briefly,
)

_NAMED = "--algo NAME"  # of the parser that has no word of its own
EXAMPLES = """\
examples:
  rllib train file tuned_examples/ppo_cartpole.yaml
  rllib train file task.py --stop training_iteration=50 --override lr=1e-4
  rllib train file task.py --override env_config.max_ops=4 --out runs/four
  rllib train file task.py --override lr='{grid_search: [1e-4, 1e-3]}'
  rllib train file task.py --resume runs/four
  rllib train file task.yaml --dry-run
  rllib train --algo PPO --env CartPole-v1 --config lr=1e-3 --stop training_iteration=20

The first Ctrl-C, or SIGTERM, leaves a rollout or finishes an update, and saves; the second quits at
once.
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib train`."""
    train = add_command(
        commands,
        "train",
        help="train an algorithm",
        usage="rllib train file FILE [OPTION ...]\n"
        "       rllib train --algo NAME [--env NAME] [--config KEY=VALUE ...] [OPTION ...]",
        description="Train what a file describes, or an algorithm of RLlib or of this package\n"
        "with its default settings on an environment.  `rllib train file --help` lists the\n"
        "options of both.",
        examples=EXAMPLES,
    )
    sources = train.add_subparsers(
        dest="source", metavar="file|--algo", required=True, prog="rllib train"
    )
    _add_file(sources)
    _add_named(sources)


def words_of(argv: Sequence[str]) -> list[str]:
    """The command line, with the word that argparse needs in `rllib train --algo ...`."""
    words = list(argv)
    if words[:1] == ["train"] and any(word.split("=")[0] == "--algo" for word in words):
        words.insert(1, _NAMED)
    return words


def _add_file(sources: Commands) -> None:
    parser = add_command(
        sources,
        "file",
        help="train what a .py or .yaml file describes",
        description="Train what FILE describes: a .py with `config` and optionally `stop`, or a\n"
        ".yaml with {name: {run, env, config, stop}}.",
        examples=EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    add_run_options(parser)
    parser.set_defaults(run=_train_file)


def _add_named(sources: Commands) -> None:
    parser = add_command(
        sources, _NAMED, help="train an algorithm with its default settings", examples=EXAMPLES
    )
    parser.prog = "rllib train"
    parser.add_argument("--algo", required=True, metavar="NAME", help="GTPO, PPO, DQN, ...")
    parser.add_argument(
        "--env", metavar="NAME", help="a name that Ray or gymnasium knows, or package.module.Class"
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings, as --override takes them",
    )
    add_run_options(parser)
    parser.set_defaults(run=_train_named)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of whatever trains."""
    add = parser.add_argument
    add(
        "--stop",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="stop when a metric is at least VALUE; a/b and a.b name nested ones (repeatable)",
    )
    add_override(parser)
    add(
        "--dry-run",
        action="store_true",
        help="check everything, print the configuration and where each value came from, and exit",
    )
    add("--all", action="store_true", help="with --dry-run: also what nobody changed")
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue a run directory, or one checkpoint in it, with its options",
    )
    add(
        "--checkpoint-freq",
        type=count,
        metavar="N",
        help="iterations between checkpoints (default: the file's, else 10; 0: only at the end)",
    )
    add(
        "--checkpoint-minutes",
        type=minutes,
        metavar="M",
        help="also save when the last checkpoint is so old (default: the file's, else never)",
    )
    add(
        "--max-failures",
        type=count,
        default=0,
        metavar="N",
        help="failures after which training begins again from the last checkpoint (default: 0)",
    )
    add("--keep", type=count, default=2, metavar="N", help="checkpoints to keep (default: 2)")
    add("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME_DATE-TIME)")
    add_session(parser)


def train(source: Any, args: argparse.Namespace, config: Sequence[str] = ()) -> int:
    """Trains a file or what names say, with the options of `add_run_options`."""
    spin_briefly()
    from rllib_gtpo.command import run

    if args.all and not args.dry_run:
        raise ConfigError("--all says how much --dry-run shows: add --dry-run, or leave it out")
    session = session_options(args)
    options = run.RunOptions(
        stop=args.stop,
        config=list(config),
        override=args.override,
        resume=args.resume,
        checkpoint_freq=args.checkpoint_freq,
        checkpoint_minutes=args.checkpoint_minutes,
        max_failures=args.max_failures,
        keep=args.keep,
        out=args.out,
        **session,
        dry_run=args.dry_run,
        show_all=args.all,
    )
    return run.train(source, options)


def _train_file(args: argparse.Namespace) -> int:
    return train(args.file, args)


def _train_named(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.resolve import Named

    return train(Named(args.algo, args.env), args, args.config)
