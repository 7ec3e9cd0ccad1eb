"""`rllib train`: arguments of training."""

from __future__ import annotations

import argparse
from pathlib import Path

from rllib_gtpo.subcommands.options import Commands, add_command, add_override, count, spin_briefly

EXAMPLES = """\
examples:
  rllib train file tuned_examples/ppo_cartpole.yaml
  rllib train file task.py --stop training_iteration=50 --override lr=1e-4
  rllib train file task.py --override env_config.max_ops=4 --out runs/four
  rllib train file task.py --resume runs/four

The first Ctrl-C finishes the step and saves; the second quits at once.
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib train`."""
    train = add_command(commands, "train", help="train an algorithm")
    sources = train.add_subparsers(dest="source", metavar="file", required=True)
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
    add("--keep", type=count, default=2, metavar="N", help="checkpoints to keep (default: 2)")
    add("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME_DATE-TIME)")
    add("--num-cpus", type=count, metavar="N", help="CPUs that Ray may count on (default: all)")
    add("--ray-address", metavar="ADDRESS", help="connect to a running Ray cluster")
    add("--debug", action="store_true", help="show all messages, and tracebacks of bad input")


def _train_file(args: argparse.Namespace) -> int:
    spin_briefly()
    from rllib_gtpo.command.run import RunOptions, train_file

    options = RunOptions(
        stop=args.stop,
        override=args.override,
        resume=args.resume,
        checkpoint_freq=args.checkpoint_freq,
        keep=args.keep,
        out=args.out,
        num_cpus=args.num_cpus,
        ray_address=args.ray_address,
        debug=args.debug,
    )
    return train_file(args.file, options)
