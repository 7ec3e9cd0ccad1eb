"""How fast and how steady is the sandbox, against `subprocess.run([python, "-c", code])`.

    python release/sandbox/bench.py                # under ten minutes
    python release/sandbox/bench.py --full         # 10,000 executions instead of 1,000
    python release/sandbox/bench.py --json FILE --markdown docs/sandbox.md   # results, table

Speed: rounds that each time everything once, so that whatever else the machine does meets all
alike; wall time, median and 99th percentile over all rounds, ratios of medians.  "fresh" is an
execution in a process of its own, "cell" one in a session.  Steadiness: memory, descriptors and
processes of this process and of the zygote, before and after many executions.  Load: 200 sessions
that each compute for a second on two cores; none may be told that it ran out of time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from release.results import Report, markdown, renewed
from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxResult, SandboxUnavailable, Status

CODE = {
    "arithmetic": ("print(sum(i * i for i in range(100)))", "328350\n"),
    "sympy": (
        "import sympy as sp\nx = sp.symbols('x')\nprint(sp.solve(x**2 - 5*x + 6, x))",
        "[2, 3]\n",
    ),
}
PRELOAD = ("numpy", "sympy")
WORKERS = 4  # executions at one time where many are counted
THRESHOLDS = {
    "sympy_fresh_ratio": {"min": 15.0},
    "sympy_cell_ratio": {"min": 150.0},
    "arithmetic_cell_ratio": {"min": 40.0},
    "rss_growth_mb": {"max": 8.0},
    "fd_growth": {"max": WORKERS},  # of the zygote: an empty place is kept for the next
    "processes_left": {"max": 0},
    "false_timeouts": {"max": 0},
}
SPEED = {"what": 26, "plain_ms": 9, "p50_ms": 8, "p99_ms": 8, "per_s": 8, "ratio": 8}
STEADY = {"what": 26, "rss_before_mb": 13, "rss_after_mb": 13, "fds": 6, "fd_growth": 9}
SESSIONS, SESSION_CPU = 200, 1.0
WARM_UP = 200  # executions before memory counts
BURN = f"import time\nwhile time.process_time() < end: pass\nprint({SESSION_CPU:g})"


def milliseconds(function: Callable[[], str], expected: str) -> float:
    """Wall time of one call, whose output is checked."""
    began = time.perf_counter()
    output = function()
    taken = (time.perf_counter() - began) * 1000
    if output != expected:
        raise AssertionError(f"wanted {expected!r}, got {output!r}")
    return taken


def plain(code: str) -> str:
    """What everybody writes first."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def quantile(values: list[float], q: float) -> float:
    """The smallest value that `q` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def measure_speed(report: Report, rounds: int) -> None:
    """Fresh executions and cells, with two preloads, against plain."""
    with (
        PythonSandbox(preload=PRELOAD) as base,
        PythonSandbox(preload=(*PRELOAD, "scipy.optimize", "scipy.stats")) as more,
        base.session() as cell,
    ):
        report.add({"what": f"rung: {base.rung}", "enforced": sum(base.guarantees.values())})
        runners: dict[str, tuple[Callable[[str], SandboxResult], int]] = {
            "fresh": (base.run, 10),
            "fresh, scipy too": (more.run, 10),
            "cell": (cell.run, 40),
        }
        times: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds + 1):
            for name, (code, expected) in CODE.items():
                taken = [milliseconds(lambda c=code: plain(c), expected)]
                times.setdefault((name, "plain"), []).extend(taken if number else [])
                for kind, (run, count) in runners.items():
                    taken = [
                        milliseconds(lambda r=run, c=code: r(c).output, expected)
                        for _ in range(count)
                    ]
                    times.setdefault((name, kind), []).extend(taken if number else [])
    for name in CODE:
        plain_ms = median(times[name, "plain"])
        for kind in runners:
            p50 = median(times[name, kind])
            ratio = plain_ms / p50
            row = {
                "what": f"{name}: {kind}",
                "plain_ms": plain_ms,
                "p50_ms": p50,
                "p99_ms": quantile(times[name, kind], 0.99),
                "per_s": 1000 / p50,
                "ratio": ratio,
            }
            if f"{name}_{kind}_ratio" in THRESHOLDS:
                row[f"{name}_{kind}_ratio"] = ratio
            report.add(row, SPEED)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    head = ["program: how", "plain, ms", "sandbox, ms", "99th percentile", "times as fast"]
    figures = ("plain_ms", "p50_ms", "p99_ms", "ratio")
    body = [[row["what"], *(f"{row[f]:.3g}" for f in figures)] for row in rows if "ratio" in row]
    return markdown(head, body)


def resources(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open descriptors."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), len(os.listdir(f"/proc/{pid}/fd"))


def descendants(pid: int) -> int:
    """Processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    below, queue = 0, [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        below += len(children)
        queue += children
    return below


def measure_steadiness(report: Report, executions: int) -> None:
    """What many executions leave behind: of ten, nine fresh and one in a session that ends."""
    with PythonSandbox(preload=PRELOAD, workers=WORKERS) as sandbox:
        zygote = sandbox._pool.zygote
        assert zygote is not None
        code, expected = CODE["arithmetic"]
        pids = {"this process": os.getpid(), "zygote": zygote.pid}

        async def worker(count: int) -> None:
            for number in range(count):
                if number % 10:
                    output = (await sandbox.arun(code)).output
                else:
                    with sandbox.session() as cell:
                        output = (await cell.arun(code)).output
                assert output == expected, output

        async def run(count: int) -> None:
            await asyncio.gather(*(worker(count // WORKERS) for _ in range(WORKERS)))

        asyncio.run(run(WARM_UP))
        settle(zygote.pid)
        before = {name: resources(pid) for name, pid in pids.items()}
        began = time.perf_counter()
        asyncio.run(run(executions))
        seconds = time.perf_counter() - began
        left = settle(zygote.pid)
        for name, pid in pids.items():
            (rss, fds), (rss_after, fds_after) = before[name], resources(pid)
            row = {"what": f"{executions} runs: {name}", "rss_before_mb": rss}
            row |= {"rss_after_mb": rss_after, "rss_growth_mb": rss_after - rss, "fds": fds_after}
            report.add({**row, "fd_growth": fds_after - fds}, STEADY)
        row = {"what": f"{executions} runs: in all", "per_s": executions / seconds}
        row |= {"processes_left": left, "restarts": sandbox.restarts}
        report.add(row, {"what": 26, "per_s": 8, "processes_left": 14, "restarts": 8})


def settle(zygote: int) -> int:
    """Wait until what has ended is gone; how many processes are left below the zygote."""
    end = time.monotonic() + 5
    while (left := descendants(zygote)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def measure_load(report: Report) -> None:
    """Sessions that compute at one time, far more than cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])  # inherited by what starts now
    limits = Limits(cpu_seconds=3)

    async def main() -> tuple[list[SandboxResult], float]:
        with PythonSandbox(limits) as sandbox:
            cells = [sandbox.session() for _ in range(SESSIONS)]
            code = f"import time; end = time.process_time() + {SESSION_CPU:g}\n{BURN}"
            began = time.perf_counter()
            results = await asyncio.gather(*(cell.arun(code) for cell in cells))
            return list(results), time.perf_counter() - began

    try:
        results, seconds = asyncio.run(main())
    finally:
        os.sched_setaffinity(0, cores)
    cpu = [r.cpu_seconds for r in results]
    row = {"what": f"{SESSIONS} sessions, {SESSION_CPU:g} s", "seconds": seconds}
    row |= {"cpu_p50": median(cpu), "cpu_max": max(cpu)}
    row |= {
        "wall_max": max(r.wall_seconds for r in results),
        "ok": sum(r.status is Status.OK for r in results),
        "false_timeouts": sum(
            r.status is Status.TIMEOUT and r.cpu_seconds < limits.cpu_seconds for r in results
        ),
    }
    report.add(row, {name: 26 if name == "what" else max(8, len(name)) for name in row})


def main() -> int:
    """Measures everything and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="10,000 executions and more rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args()
    report = Report("sandbox", THRESHOLDS, [])
    try:
        measure_speed(report, 60 if args.full else 20)
        measure_steadiness(report, 10_000 if args.full else 1_000)
        measure_load(report)
    except (SandboxUnavailable, FileNotFoundError) as error:
        print(f"cannot run: {error}")
        return 2
    if args.markdown:
        shown = {"sandbox": table(report.rows)}
        args.markdown.write_text(renewed(args.markdown.read_text(), shown))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
