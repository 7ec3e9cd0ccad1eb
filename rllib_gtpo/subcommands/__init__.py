"""The subcommands of `rllib`, a module each: `add_to(commands)` adds its parser, whose default
`run` takes the parsed arguments and returns the exit code.

Nothing here imports Ray or torch before a command runs, so that `rllib --help` is quick.
"""

from __future__ import annotations

from rllib_gtpo.subcommands import convert, evaluate, example, export, plan, report, train

IN_ORDER_OF_HELP = (
    train,
    evaluate,
    example,
    convert,
    export,
    report,
    plan,
)
