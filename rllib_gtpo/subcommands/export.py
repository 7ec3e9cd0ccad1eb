"""`rllib export`: a checkpoint's model as a Hugging Face directory."""

from __future__ import annotations

import argparse

from rllib_gtpo.subcommands.options import Commands, add_command, add_paths

EXAMPLES = """\
examples:
  rllib export runs/four model
  rllib export runs/four/checkpoint_000010 model --dtype bfloat16
"""


def add_to(commands: Commands) -> None:
    """Adds `rllib export`."""
    parser = add_command(
        commands,
        "export",
        help="write a checkpoint's model as a Hugging Face directory",
        description="Write the model of a run's last checkpoint, or of a named one, with its\n"
        "tokenizer, chat template, generation config and a model card, for transformers, vLLM, ...",
        examples=EXAMPLES,
    )
    add_paths(parser, "RUN|CHECKPOINT", "DIR")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as trained)")
    parser.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone, for peft (default: merged)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from rllib_gtpo.command.export import export
    from rllib_gtpo.command.quiet import silence

    silence()
    chosen = {"dtype": args.dtype, "push_to": args.push, "adapter": args.adapter}
    print(export(args.source, args.target, **chosen))
    return 0
