"""How much reward leaks to wrong code that looks right?  Shaping on problems made to mislead it.

Each problem has a right program, and wrong ones of several kinds; each wrong one is the failed
member of a group in which the right one is correct.  With alpha 0.5, a perfect copy is worth 0.5.
"honest" is what shaping means to pay for: the right program, unfinished.  What the other kinds get
beyond "unrelated" is leakage.

    python release/learning/leakage.py [--embedder NAME] [--json FILE] [--markdown PAGE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from release.results import Report, markdown, renewed
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.types import Group, ToolCall, ToolResult, Trajectory, Turn

RIGHT = {
    "primes": "n=30\nprimes=[p for p in range(2,n) if all(p%d for d in range(2,p))]\n"
    "print(sum(primes))",
    "root": "from sympy import symbols, solve\nx=symbols('x')\nroots=solve(x**2-5*x+6, x)\n"
    "print(max(roots))",
    "digits": "total=0\nfor k in range(1,101):\n    total+=sum(int(c) for c in str(k))\n"
    "print(total)",
    "fibonacci": "a,b=0,1\nfor i in range(20):\n    a,b=b,a+b\nprint(a)",
    "gcd": "def gcd(a,b):\n    while b:\n        a,b=b,a%b\n    return a\nprint(gcd(1071,462))",
    "chain": "a=12+7\nb=a*3\nc=b-5\nprint(c)",
}
WRONG = {
    "one operator": {
        "primes": ("p%d", "p//d"),
        "root": ("x**2-5*x", "x**2+5*x"),
        "digits": ("total+=", "total-="),
        "fibonacci": ("a+b", "a-b"),
        "gcd": ("a%b", "a//b"),
        "chain": ("a*3", "a+3"),
    },
    "one constant": {
        "primes": ("n=30", "n=31"),
        "root": ("+6", "+4"),
        "digits": ("101", "100"),
        "fibonacci": ("20", "21"),
        "gcd": ("462", "463"),
        "chain": ("-5", "-6"),
    },
    "wrong name printed": {
        "primes": ("print(sum(primes))", "print(sum(range(n)))"),
        "root": ("max(roots)", "min(roots)"),
        "digits": ("print(total)", "print(k)"),
        "fibonacci": ("print(a)", "print(b)"),
        "gcd": ("print(gcd(1071,462))", "print(gcd(462,462))"),
        "chain": ("print(c)", "print(b)"),
    },
}
UNRELATED = "import json\nwith open('data.json') as f:\n    rows=json.load(f)\nprint(len(rows))"


def wrong_programs(name: str) -> dict[str, str]:
    """Every kind of wrong program of a problem."""
    right = RIGHT[name]
    lines = right.split("\n")
    programs = {kind: right.replace(*edits[name]) for kind, edits in WRONG.items()}
    for kind, program in programs.items():
        if program == right:
            raise ValueError(f"{name}: {kind} changes nothing")
    commented = "\n".join(f"# {line}" for line in lines)
    return {
        "honest: unfinished": "\n".join(lines[:-1]),
        **programs,
        "right code in a comment": f"{commented}\nprint(0)",
        "right code never run": f'unused="""{right}"""\nprint(0)',
        "right code under if False": "if False:\n"
        + "\n".join(f"    {line}" for line in lines)
        + "\nprint(0)",
        "unrelated": UNRELATED,
    }


def member(code: str, correct: bool) -> Trajectory:
    """A rollout whose only call is that code."""
    call = Turn(0, calls=[ToolCall("python", {"code": code})], results=[ToolResult("python", "")])
    last = Turn(1, rewards={"accuracy": float(correct)})
    return Trajectory({}, turns=[call, last], correct=correct)


def leaked(shaping: Shaping) -> dict[str, list[float]]:
    """The reward of every kind, by problem."""
    got: dict[str, list[float]] = {}
    for name, right in RIGHT.items():
        for kind, program in wrong_programs(name).items():
            group = Group(0, {}, [member(program, False), member(right, True)])
            shaping.score_groups([group])
            got.setdefault(kind, []).append(group.trajectories[0].turns[-1].rewards["shaping"])
    return got


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    body = [[row["kind"], *(f"{row[k]:.2f}" for k in ("mean", "min", "max"))] for row in rows]
    return markdown(["code of the failed rollout", "mean reward", "least", "most"], body)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedder", default="python_tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args()
    report = Report("leakage", {}, [])
    for kind, rewards in leaked(Shaping(build_embedder(args.embedder))).items():
        row = {"kind": kind, "mean": float(np.mean(rewards))}
        row |= {"min": float(min(rewards)), "max": float(max(rewards))}
        report.add(row, show={"kind": 28, "mean": 8, "min": 8, "max": 8})
    if args.markdown:
        args.markdown.write_text(
            renewed(args.markdown.read_text(), {"leakage": table(report.rows)})
        )
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
