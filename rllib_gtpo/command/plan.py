"""`rllib plan FILE`: memory and time of a run before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rllib_gtpo.command.files import load_experiment
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.command.resolve import check
from rllib_gtpo.command.settings import apply_overrides

FITS, DOES_NOT_FIT = 0, 2


def plan_file(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    memory_gib: float | None = None,
    tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Prints the plan of an experiment; returns the exit code."""
    silence()
    experiment = load_experiment(path)
    apply_overrides(experiment.config, overrides, experiment.places)
    # After what loads the libraries, whose memory each process will need.
    from rllib_gtpo.planning.plan import GIB, make_plan, refuse_others

    config = refuse_others(experiment.config)
    check(experiment)
    memory = None if memory_gib is None else memory_gib * GIB
    plan = make_plan(config, memory=memory, tokens=tokens)
    print(json.dumps(plan.to_dict(), indent=1) if as_json else plan)
    return FITS if plan.fits else DOES_NOT_FIT
