"""The `rllib` command: arguments and dispatch.  Ray is imported only by what needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rllib_gtpo.errors import ConfigError

EXIT_CODES = """\
exit codes:
  0  done            1  failed while training     2  bad input (file, option, setting)
  3  the last checkpoint could not be saved     130, 143  interrupted (Ctrl-C, SIGTERM)
  141  the reader of the output went away
"""

TRAIN_EXAMPLES = """\
examples:
  rllib train file tuned_examples/ppo_cartpole.yaml
  rllib train file task.py --stop training_iteration=50 --override lr=1e-4
  rllib train file task.py --override env_config.max_ops=4 --out runs/four
  rllib train file task.py --resume runs/four

The first Ctrl-C finishes the step and saves; the second quits at once.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="rllib",
        description="Train any RLlib algorithm, and LLM tool agents with GTPO.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="train an algorithm")
    sources = train.add_subparsers(dest="source", metavar="file", required=True)
    _add_train_file(sources)
    example = commands.add_parser("example", help="tuned examples")
    actions = example.add_subparsers(dest="action", metavar="list", required=True)
    actions.add_parser("list", help="list the tuned examples").set_defaults(run=_example_list)
    _add_convert(commands)
    _add_export(commands)
    _add_report(commands)

    _add_plan(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        return _version()
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    from rllib_gtpo.command.failures import guarded

    return guarded(lambda: int(args.run(args)), debug=getattr(args, "debug", False))


def _add_train_file(sources: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = sources.add_parser(
        "file",
        help="train what a .py or .yaml file describes",
        description="Train what FILE describes: a .py with `config` and optionally `stop`, or a "
        ".yaml with {name: {run, env, config, stop}}.",
        epilog=TRAIN_EXAMPLES + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="stop when a metric is at least VALUE; a/b and a.b name nested ones (repeatable)",
    )
    _add_override(parser)
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue a run directory, or one checkpoint in it, with its options",
    )
    add(
        "--checkpoint-freq",
        type=_count,
        metavar="N",
        help="iterations between checkpoints (default: the file's, else 10; 0: only at the end)",
    )
    add("--keep", type=_count, default=2, metavar="N", help="checkpoints to keep (default: 2)")
    add("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME_DATE-TIME)")
    add("--num-cpus", type=_count, metavar="N", help="CPUs that Ray may count on (default: all)")
    add("--ray-address", metavar="ADDRESS", help="connect to a running Ray cluster")
    add("--debug", action="store_true", help="show all messages, and tracebacks of bad input")
    parser.set_defaults(run=_train_file)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="make demonstrations for a cold start from tool traces",
        description="Convert tool traces (.jsonl, .json, .parquet) to the JSON lines that "
        "cold_start.data takes.  Rows that cannot be used are left out and counted.",
    )
    _add_paths(parser, "IN", "OUT")
    parser.add_argument("--from", dest="kind", required=True, choices=("openhands", "sharegpt"))
    parser.add_argument(
        "--keep-failed",
        action="store_true",
        help="also traces that say of themselves that they failed (resolved, success, correct)",
    )
    parser.set_defaults(run=_convert)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint's model as a Hugging Face directory",
        description="Write the model of a run's last checkpoint, or of a named one, with its "
        "tokenizer, chat template, generation config and a model card, for transformers, vLLM, ...",
    )
    _add_paths(parser, "RUN|CHECKPOINT", "DIR")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as trained)")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone, for peft (default: merged)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub")
    parser.set_defaults(run=_export)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="show why turns got the credit that they got",
        description="Write one HTML file, which needs no network: a run's learning curves, its "
        "recorded groups turn by turn, and what other estimators would have said of them.",
    )
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="a directory, or s3://...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.add_argument("--terminal", action="store_true", help="print the main things instead")
    parser.set_defaults(run=_report)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="say what memory and time a run needs, and whether it fits",
        description="Print the memory of each worker of what FILE describes, by what it is needed "
        "for, and the time of an iteration, from a probe of a few seconds.  Exit code 2, with what "
        "to change, if it cannot fit.  Nothing is trained, and no weights are loaded.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="as for `rllib train file`")
    _add_override(parser)
    add(
        "--memory",
        type=_positive,
        metavar="GIB",
        help="of each GPU, or of the machine if no worker has one (default: those of this machine)",
    )
    add(
        "--tokens",
        type=_count,
        metavar="N",
        help="mean length of a trajectory, for the time (default: as long as the settings allow)",
    )
    add("--json", action="store_true", help="print JSON; sizes in bytes")
    parser.set_defaults(run=_plan)


def _add_override(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, also a nested one: env_config.max_ops=4 (repeatable)",
    )


def _add_paths(parser: argparse.ArgumentParser, source: str, target: str) -> None:
    """What a command reads and what it makes, by the names that its help gives them."""
    for name, shown in (("source", source), ("target", target)):
        parser.add_argument(name, type=Path, metavar=shown)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


_count.__name__ = _positive.__name__ = "number"  # argparse names the type in its messages


def _spin_briefly() -> None:
    # OpenMP threads spin while they wait, by default for so long that small models train tens of
    # times slower as soon as another process wants a core.  Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _train_file(args: argparse.Namespace) -> int:
    _spin_briefly()
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


def _example_list(_args: argparse.Namespace) -> int:
    from rllib_gtpo.command.examples import list_examples

    return list_examples()


def _convert(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.convert import convert

    print(convert(args.source, args.target, args.kind, keep_failed=args.keep_failed))
    return 0


def _export(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.export import export
    from rllib_gtpo.command.quiet import silence

    silence()
    chosen = {"dtype": args.dtype, "push_to": args.push, "adapter": args.adapter}
    print(export(args.source, args.target, **chosen))
    return 0


def _report(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.quiet import silence

    silence()
    from rllib_gtpo.report import build_report, print_report

    if args.terminal and args.out is not None:
        raise ConfigError("--out names the HTML file: leave out --terminal, or --out.")
    if args.terminal:
        print_report(args.source)
    else:
        print(build_report(args.source, args.out))
    return 0


def _plan(args: argparse.Namespace) -> int:
    _spin_briefly()
    from rllib_gtpo.command.plan import plan_file

    return plan_file(
        args.file,
        args.override,
        memory_gib=args.memory,
        tokens=args.tokens,
        as_json=args.json,
    )


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
