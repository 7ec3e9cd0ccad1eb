"""`rllib evaluate`: policies and files of results, alone or one against another."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_gtpo.command.interrupts import Stopper
from rllib_gtpo.command.ray_session import check_resources, ray_session
from rllib_gtpo.errors import ConfigError, Interrupted
from rllib_gtpo.evaluations.comparison import AVERAGE, compare, differing_settings, metric_of
from rllib_gtpo.evaluations.policy import Policy
from rllib_gtpo.evaluations.protocol import Protocol, evaluation_settings
from rllib_gtpo.evaluations.results import DIRECTORY, SUFFIX, Results
from rllib_gtpo.evaluations.run import evaluate_episodes, evaluate_tasks, write_results
from rllib_gtpo.evaluations.show import (
    numbers_of,
    print_comparison,
    print_episodes,
    print_results,
)
from rllib_gtpo.record.location import Location
from rllib_gtpo.report.terminal import open_console


@dataclass
class EvaluateOptions:
    """The options of `rllib evaluate`."""

    protocol: Protocol = field(default_factory=Protocol)
    compare: str | None = None
    metric: str = AVERAGE
    out: str | None = None
    record: bool = False
    as_json: bool = False
    num_cpus: int | None = None
    num_gpus: int | None = None
    ray_address: str | None = None
    debug: bool = False


@dataclass
class Side:
    """One of what is compared: results, or a policy that is yet to be evaluated.

    numbers: Of an algorithm that has no tasks.
    """

    name: str
    policy: Policy | None = None
    settings: Any = None
    results: Results | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    written: str | None = None
    records: list[str] = field(default_factory=list)


def evaluate(source: str, options: EvaluateOptions) -> int:
    """Evaluates, writes the results and prints them; the exit code.

    Raises:
        ConfigError, DataError: Something is wrong with a checkpoint, a file or an option; see
            `Policy.open`, `evaluation_settings`, `compare`.
    """
    named = [source] if options.compare is None else [source, options.compare]
    with redirect_stdout(sys.stderr) if options.as_json else nullcontext():
        sides = [_open(name, options) for name in named]
        code = _evaluate(sides, options)
    if code == 0:
        _print(sides, options)
    return code


def _open(name: str, options: EvaluateOptions) -> Side:
    path = Path(name)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file.")
        return Side(name, results=Results.read(path))
    policy = Policy.open(path)
    for note in policy.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.compare is not None and not policy.is_language_model:
        raise ConfigError(
            f"{name} is a checkpoint of {policy.algorithm}, which is evaluated on episodes and not "
            "on tasks that could be compared one by one: leave --compare out."
        )
    return Side(name, policy=policy)


def _evaluate(sides: list[Side], options: EvaluateOptions) -> int:
    """Evaluates the policies, all by one protocol: a file's, or that of the first of them.

    Returns:
        0, or the exit code of the signal that stopped it.
    """
    protocol = options.protocol
    known = next((side.results for side in sides if side.results is not None), None)
    if known is not None and len(sides) > 1:
        protocol = protocol.following(known.about)
    waiting = [(side, side.policy) for side in sides if side.policy is not None]
    needs: dict[str, float] = {}
    for side, policy in waiting:
        side.settings = evaluation_settings(policy, protocol)
        if policy.is_language_model:
            protocol = protocol.filled(side.settings)
            metric_of(options.metric, side.settings.evaluation_samples_per_task)
        for resource, amount in check_resources(side.settings).items():
            needs[resource] = max(needs.get(resource, 0.0), amount)
    if not waiting:
        return 0
    stopper = Stopper("stopping; results that are written stay")
    with ray_session(needs, options), stopper, suppress(Interrupted):
        for side, policy in waiting:
            if not policy.is_language_model:
                side.numbers = evaluate_episodes(policy, side.settings)
                continue
            evaluated = evaluate_tasks(policy, side.settings, protocol, stopper)
            side.results = evaluated.results
            place = Location.of(options.out or policy.home / DIRECTORY)
            side.written, side.records = write_results(
                evaluated, policy, side.settings, place, options.record
            )
    return stopper.code


def _print(sides: list[Side], options: EvaluateOptions) -> None:
    found = [side.results for side in sides if side.results is not None]
    pair = (found[0], found[1]) if len(found) == 2 else None
    comparisons = compare(*pair, metric=options.metric) if pair else []
    if options.as_json:
        shown: dict[str, Any] = {
            "evaluations": [
                {
                    **(numbers_of(side.results) if side.results else {"numbers": side.numbers}),
                    "name": side.name,
                    "results": side.written,
                    "records": side.records,
                }
                for side in sides
            ],
            "comparisons": [comparison.as_dict() for comparison in comparisons],
        }
        print(json.dumps(shown, indent=2, default=str))
        return
    console = open_console()
    for side in sides:
        if side.results is None:
            print_episodes(console, side.name, side.numbers)
        else:
            print_results(console, side.results)
    for comparison in comparisons:
        print_comparison(console, comparison, *found)
    for difference in differing_settings(*pair) if pair else ():
        print(f"note: {difference}")
    for side in sides:
        for path in [side.written, *side.records]:
            if path is not None:
                print(path)
