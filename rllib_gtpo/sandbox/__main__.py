"""`python -m rllib_gtpo.sandbox check`: what is enforced on this machine, and the threats."""

from __future__ import annotations

import argparse
import json
import sys

from rllib_gtpo.sandbox.arena import Arena, Outcome
from rllib_gtpo.sandbox.guarantees import MEANINGS
from rllib_gtpo.sandbox.limits import SandboxUnavailable
from rllib_gtpo.sandbox.python import LAYERS
from rllib_gtpo.sandbox.threats import THREATS, Threat

EPILOG = """Exit status: 0 if every threat was stopped, 1 if one got through or did damage, 2 if the
sandbox cannot start. With --layers rlimits-only only the threats run that are harmless where
nothing stops them; those must get through, so the exit status is 1: that is the negative control.
Bugs of the kernel stay in reach: put workers whose machine matters under gVisor or in a VM."""


def select(layers: str, pattern: str) -> list[Threat]:
    """The threats to run; unconfined, only those that are harmless and meant to succeed."""
    chosen = [t for t in THREATS if pattern in t.name]
    return [t for t in chosen if t.control] if layers == "rlimits-only" else chosen


def _row(outcome: Outcome) -> str:
    threat, status = outcome.threat, outcome.result.status
    verdict = f"stopped ({status})"
    if outcome.breaches:
        verdict = f"GOT THROUGH: {', '.join(outcome.breaches)}"
    elif outcome.damage:
        verdict = f"DAMAGE: {'; '.join(outcome.damage)}"
    return f"{threat.name:<66} {threat.layer:<9} {verdict}"


def check(layers: str, pattern: str, as_json: bool) -> int:
    """Run the threats and print a table, or JSON; returns the exit status."""
    threats = select(layers, pattern)
    try:
        arena = Arena(layers)
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    outcomes = []
    with arena:
        guarantees = arena.sandbox.guarantees
        if not as_json:
            print(f"Rung: {arena.sandbox.rung}\n")
            for name, meaning in MEANINGS.items():
                print(f"{'yes' if guarantees[name] else 'NO':<4} {name:<28} {meaning}")
            print(f"\n{'Threat':<66} {'Stopped by':<9} Outcome")
        for threat in threats:
            outcome = arena.run(threat)
            outcomes.append(outcome)
            if not as_json:
                print(_row(outcome), flush=True)
    bad = [outcome for outcome in outcomes if not outcome.stopped]
    if as_json:
        rows = [
            {"name": o.threat.name, "status": o.result.status, "breaches": o.breaches}
            | {"damage": o.damage, "output": o.result.output[-500:] if o.damage else ""}
            for o in outcomes
        ]
        print(
            json.dumps({"rung": arena.sandbox.rung, "guarantees": {**guarantees}, "threats": rows})
        )
    else:
        print(f"\n{len(outcomes) - len(bad)} of {len(outcomes)} threats stopped.")
    return 1 if bad else 0


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m rllib_gtpo.sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "check",
        help="print what is enforced on this machine and run the threats",
        description="Print what is enforced on this machine, and run hostile code against it.",
        epilog=EPILOG,
    )
    sub.add_argument(
        "--layers",
        choices=LAYERS,
        default="auto",
        help="start no higher on the ladder; rlimits-only is the negative control",
    )
    sub.add_argument("--only", default="", metavar="TEXT", help="threats whose name contains TEXT")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    return check(arguments.layers, arguments.only, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
