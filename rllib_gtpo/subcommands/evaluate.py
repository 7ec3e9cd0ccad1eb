"""`rllib evaluate`: a policy on the tasks of an environment, alone or against another one."""

from __future__ import annotations

import argparse

from rllib_gtpo.subcommands.options import (
    Commands,
    add_command,
    add_override,
    add_session,
    count,
    session_options,
    spin_briefly,
)

EXAMPLES = """\
examples:
  rllib evaluate runs/four
  rllib evaluate runs/four --split test --samples-per-task 8
  rllib evaluate runs/four/checkpoint_000020 --compare runs/four/checkpoint_000010
  rllib evaluate runs/four --compare runs/four/evaluations/checkpoint_000010-test.parquet
  rllib evaluate runs/four --env rllib_gtpo_envs.Calculator --override env_config.operations=[5,5]
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        help="evaluate a checkpoint, or compare two",
        description="Evaluate a run's last checkpoint, or a named one, on the tasks of its\n"
        "environment or of another one: avg@k, pass@k, maj@k with 95% intervals, turns, tokens,\n"
        "errors.  Results of each task go to RUN/evaluations as Parquet; such a file can be shown\n"
        "and compared again.  The run's own file is not needed.  Other algorithms are evaluated\n"
        "on episodes: returns and lengths.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("source", metavar="RUN|CHECKPOINT|FILE.parquet")
    add("--compare", metavar="SOURCE", help="a second one, on the same tasks: a paired comparison")
    add(
        "--metric",
        default="avg",
        metavar="NAME",
        help="what is compared of each task: avg (default), pass@K or maj",
    )
    add(
        "--split",
        action="append",
        dest="splits",
        metavar="NAME",
        help="of the environment (default: that of the run's evaluations; repeatable)",
    )
    add(
        "--samples-per-task",
        type=_at_least_one,
        metavar="K",
        help="default: as in the run's evaluations",
    )
    add(
        "--tasks",
        type=_at_least_one,
        metavar="N",
        help="the first N of each split (default: all); of other algorithms, episodes",
    )
    add("--temperature", type=float, metavar="T", help="default: as in the run's evaluations")
    add("--seed", type=count, metavar="N", help="of the sampler (default: the run's)")
    add("--env", metavar="NAME", help="another environment: a registered name, or MODULE.CLASS")
    add_override(parser)
    add("--out", metavar="DIR", help="for results, instead of RUN/evaluations; also s3://...")
    add("--record", action="store_true", help="also write whole rollouts; see docs/record.md")
    add("--json", action="store_true", help="print JSON")
    add("--num-env-runners", type=count, metavar="N", help="default: as the run's; 0: in process")
    add_session(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    spin_briefly()
    if not args.debug:
        from rllib_gtpo.command.quiet import silence

        silence()
    from rllib_gtpo.evaluations.command import EvaluateOptions, evaluate
    from rllib_gtpo.evaluations.protocol import Protocol

    protocol = Protocol(
        splits=tuple(args.splits) if args.splits else None,
        samples_per_task=args.samples_per_task,
        tasks=args.tasks,
        temperature=args.temperature,
        seed=args.seed,
        env=args.env,
        overrides=args.override,
        num_env_runners=args.num_env_runners,
    )
    options = EvaluateOptions(
        protocol,
        compare=args.compare,
        metric=args.metric,
        out=args.out,
        record=args.record,
        as_json=args.json,
        **session_options(args),
    )
    return evaluate(args.source, options)


def _at_least_one(text: str) -> int:
    number = count(text)
    if not number:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


_at_least_one.__name__ = count.__name__
