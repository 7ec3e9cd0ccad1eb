"""What a run prints at its end."""

from __future__ import annotations

import atexit
import shlex
import sys
from pathlib import Path

from rllib_gtpo.command.directory import Checkpoint, RunDirectory
from rllib_gtpo.command.streams import mute_stdout


def keep_colour_codes_away() -> None:
    """Ray's copy of colorama writes a reset code when the program ends, even behind plain text."""
    colorama = sys.modules.get("colorama.initialise")
    if colorama is not None:
        atexit.unregister(colorama.reset_all)


def print_end(run: RunDirectory, checkpoint: Checkpoint, complete: bool = True) -> None:
    """The last lines: accuracy if the algorithm measures one, checkpoint, how to continue."""
    keep_colour_codes_away()
    try:
        if complete and run.record.held_out_accuracy:
            before, after = run.record.held_out_accuracy
            print(f"held-out accuracy {before:.2f} -> {after:.2f}")
        print(checkpoint.path.absolute())
        print(resume_command(run), flush=True)
    except BrokenPipeError:
        mute_stdout()


def resume_command(run: RunDirectory) -> str:
    """The command that continues `run` from the present directory."""
    source = run.record.source or ["file", _relative(Path(run.record.file))]
    return shlex.join(["rllib", "train", *source, "--resume", _relative(run.path)])


def _relative(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
