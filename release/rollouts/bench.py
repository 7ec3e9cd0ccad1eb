"""How much of the engine's speed do multi-turn rollouts get?  On the calculator, in one process.

    python release/rollouts/bench.py                # under ten minutes on two cores
    python release/rollouts/bench.py --full         # more repetitions
    python release/rollouts/bench.py --json FILE --markdown docs/speed.md   # results, table

A repetition rolls out groups with the real environment runner, and then feeds the *bare* engine,
one of the same kind over the same model, with the same token counts: the same prompts, as many
sampled tokens in every turn, as many new context tokens between turns, as many trajectories at one
time.  No environment, no chat template, no tools: what is sampled is thrown away, and the recorded
ids follow.  The two alternate, so that whatever else the machine does meets both; the ratio is the
median over the repetitions.

Rows: three sizes of one model (see release/rollouts/start.py), and the calculator's tool in its
sandbox or as a function in this process.  `overhead_ms` is what a request costs beyond the engine,
in wall time; `cpu_ms` the processor time in it, of this process and of the sandbox's.  `cpu_ratio`
is the ratio of processor times, which means something on a busy machine, too; where the sandbox
runs beside the engine on a core of its own, it is lower than `ratio`.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `rllib` does

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from release.results import Report, markdown, renewed
from release.rollouts.start import SIZES, save_cold_started, save_widened
from rllib_gtpo import GTPOConfig
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.engines.base import Request, RolloutEngine, SamplingParams
from rllib_gtpo.env_runner import GroupJob, GTPOEnvRunner
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.sandbox import SandboxResult, Status
from rllib_gtpo_envs import Calculator
from rllib_gtpo_envs.chains import first_step, result_of

RUNS = {"tiny": (16, 7), "small": (8, 6), "base": (4, 3)}  # groups and repetitions by size
BOUND = (("small", "function"), ("base", "function"))
"""Rows with a threshold: a model that a turn takes some time of, and no processes that compete with
it for the cores."""
THRESHOLDS = {f"ratio_{size}_{tool}": {"min": 0.90} for size, tool in BOUND}
SEED, MEMBERS, TURN_TOKENS = 0, 8, 24
SHOW = {"model": 6, "tool": 9, "requests": 8, "rollout_tok_s": 13, "bare_tok_s": 10, "ratio": 7}
SHOW |= {"ratio_min": 9, "ratio_max": 9, "cpu_ratio": 9, "request_ms": 10, "overhead_ms": 11}
SHOW |= {"cpu_ms": 8}


class InProcess(Calculator):
    """The calculator with its tool as a function of this process."""

    async def run_python(self, code: str) -> SandboxResult:
        """What `print` of one operation prints; anything else is a syntax error."""
        match = re.fullmatch(r"print\((.*)\)", code.strip())
        step = first_step(match[1]) if match else None
        if step is None or step[3]:
            return SandboxResult(Status.ERROR, "SyntaxError: invalid syntax", 0.0, 0.0)
        first, operator, second, _ = step
        output = f"{result_of(int(first), operator, int(second))}\n"
        return SandboxResult(Status.OK, output, 0.0, 0.0)


TOOLS: dict[str, type[Calculator]] = {"sandbox": Calculator, "function": InProcess}


@dataclass(frozen=True)
class Script:
    """What a trajectory asked of the engine: for each turn the new context and how many tokens it
    sampled."""

    turns: list[tuple[list[int], int]]

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(count for _, count in self.turns)


@dataclass
class Timed:
    """One side of one repetition, in seconds."""

    wall: float
    cpu: float


@contextmanager
def timed(into: list[Timed]) -> Iterator[None]:
    """Times its block: wall, and the processor time of this process and those below it."""
    wall, cpu = time.perf_counter(), processor_seconds()
    yield
    into.append(Timed(time.perf_counter() - wall, processor_seconds() - cpu))


def processor_seconds() -> float:
    """What this process and those below it have used, those that have ended included."""
    below = sum(ticks for _, ticks in descendants(os.getpid()))
    own = os.times()
    ended = own.children_user + own.children_system
    return time.process_time() + ended + below / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> Iterator[tuple[int, int]]:
    """Processes below `pid`, with the clock ticks of each and of its children that have ended."""
    children: dict[int, list[tuple[int, int]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks = sum(map(int, fields[11:15]))
            children.setdefault(int(fields[1]), []).append((int(entry.name), ticks))
    queue = [pid]
    while queue:
        found = children.get(queue.pop(), [])
        yield from found
        queue += [child for child, _ in found]


def build_config(model: Path, tool: str, concurrency: int) -> GTPOConfig:
    """Rollouts of the calculator as the tuned example makes them."""
    return (
        GTPOConfig()
        .environment(TOOLS[tool])
        .language_model(model=str(model), call_format="fenced")
        .rollouts(max_turn_tokens=TURN_TOKENS, max_concurrency=concurrency)
        .training(group_size=MEMBERS)
        .reporting(progress=False)
        .debugging(seed=SEED)
    )


def build_runner(config: GTPOConfig) -> GTPOEnvRunner:
    """An environment runner in this process."""
    return GTPOEnvRunner(config=config, env_creator=config.env, worker_index=0)


def hf_engine(config: GTPOConfig, runner: GTPOEnvRunner) -> RolloutEngine:
    """A bare engine: the runner's kind, over its model, with its settings."""
    return config.build_engine(runner.module)


BARE: dict[str, Callable[[GTPOConfig, GTPOEnvRunner], RolloutEngine]] = {"hf": hf_engine}


def recorded(episodes: Sequence[Any]) -> list[Script]:
    """The scripts of finished episodes."""
    trajectories = [trajectory_of(episode) for episode in episodes]
    return [
        Script([(list(turn.prompt_ids), len(turn.token_ids)) for turn in t.turns])
        for t in trajectories
    ]


async def replay(engine: RolloutEngine, scripts: Sequence[Script], concurrency: int) -> int:
    """Feeds an engine with scripts; returns how many tokens it sampled."""
    slots = asyncio.Semaphore(concurrency)

    async def run(number: int, script: Script) -> int:
        context: list[int] = []
        sampled = 0
        async with slots:
            for turn, (new, count) in enumerate(script.turns):
                context = context + new
                request = Request(
                    f"bare{number}", context, SamplingParams(count), (SEED, number, turn)
                )
                completion = await engine.generate(request)
                context = context + completion.token_ids
                sampled += len(completion.token_ids)
            engine.release(f"bare{number}")
        return sampled

    return sum(await asyncio.gather(*(run(n, s) for n, s in enumerate(scripts))))


def measure(
    model: Path, size: str, tool: str, groups: int, concurrency: int, repetitions: int
) -> dict[str, Any]:
    """A row: rollouts and the bare engine in turns, after one of each that is not counted."""
    config = build_config(model, tool, concurrency)
    runner = build_runner(config)
    engine = BARE[config.engine](config, runner)
    rollout: list[Timed] = []
    bare: list[Timed] = []
    counts = []
    try:
        for repetition in range(repetitions + 1):
            first = repetition * groups  # of tasks that it has not seen
            jobs = [GroupJob(position, MEMBERS, 0) for position in range(first, first + groups)]
            with timed(rollout):
                episodes = runner.sample_groups(jobs).episodes
            scripts = recorded(episodes)
            with timed(bare):
                sampled = asyncio.run(replay(engine, scripts, concurrency))
            tokens = sum(script.tokens for script in scripts)
            if sampled != tokens:
                raise AssertionError(f"the bare engine sampled {sampled} tokens, not {tokens}")
            counts.append((tokens, sum(len(script.turns) for script in scripts)))
    finally:
        engine.close()
        runner.stop()
    parameters = sum(p.numel() for p in runner.module.model.parameters())
    row = {"model": size, "parameters": parameters, "tool": tool, "concurrency": concurrency}
    row |= summary(rollout[1:], bare[1:], counts[1:])
    if (size, tool) in BOUND:
        row[f"ratio_{size}_{tool}"] = row["ratio"]
    return row


def summary(
    rollout: Sequence[Timed], bare: Sequence[Timed], counts: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Medians over the repetitions; `counts` are tokens and requests of each."""
    ratios = [b.wall / r.wall for r, b in zip(rollout, bare, strict=True)]
    each = list(zip(rollout, bare, counts, strict=True))
    return {
        "sampled_tokens": median(tokens for tokens, _ in counts),
        "requests": median(requests for _, requests in counts),
        "rollout_tok_s": median(tokens / r.wall for r, _, (tokens, _) in each),
        "bare_tok_s": median(tokens / b.wall for _, b, (tokens, _) in each),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cpu_ratio": median(b.cpu / r.cpu for r, b, _ in each),
        "request_ms": 1000 * median(b.wall / n for _, b, (_, n) in each),
        "overhead_ms": 1000 * median((r.wall - b.wall) / n for r, b, (_, n) in each),
        "cpu_ms": 1000 * median((r.cpu - b.cpu) / n for r, b, (_, n) in each),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    head = ["model, parameters", "tool", "rollouts, tokens/s", "bare engine", "ratio (range)"]
    head += ["of processor time", "a request, ms", "overhead, ms"]
    body = [
        [
            f"{row['model']}, {row['parameters'] / 1e6:.1f} M",
            row["tool"],
            f"{row['rollout_tok_s']:.0f}",
            f"{row['bare_tok_s']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['cpu_ratio']:.2f}",
            f"{row['request_ms']:.2f}",
            f"{row['overhead_ms']:.2f}",
        ]
        for row in rows
    ]
    return markdown(head, body)


def parser_of(doc: str, sizes: Sequence[str], tools: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments of a bench of rollouts; by default it measures these sizes and tools."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(sizes), choices=list(sizes))
    parser.add_argument("--tools", nargs="+", default=list(tools), choices=list(TOOLS))
    parser.add_argument("--groups", type=int, help=f"of {MEMBERS} trajectories, for all sizes")
    parser.add_argument("--concurrency", type=int, default=128, help="trajectories at one time")
    parser.add_argument("--repetitions", type=int, help="for all sizes")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep or reuse the models here")
    parser.add_argument("--cold-start", type=int, default=600, metavar="STEPS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every size and tool, and checks the thresholds."""
    parser = parser_of(__doc__, list(SIZES), list(TOOLS))
    parser.add_argument("--full", action="store_true", help="four times as many repetitions")
    args = parser.parse_args(argv)
    silence()
    report = Report("rollouts", THRESHOLDS, [SEED])
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        make_models(models, args.sizes, args.cold_start)
        for size in args.sizes:
            groups, repetitions = RUNS[size]
            groups, repetitions = args.groups or groups, args.repetitions or repetitions
            repetitions *= 4 if args.full else 1
            for tool in args.tools:
                row = measure(models / size, size, tool, groups, args.concurrency, repetitions)
                report.add(row, SHOW)
    if args.markdown:
        shown = {"rollouts": table(report.rows)}
        args.markdown.write_text(renewed(args.markdown.read_text(), shown))
    return report.finish(args.json)


def make_models(folder: Path, sizes: Sequence[str], steps: int) -> None:
    """Makes those models that the folder lacks."""
    if not (folder / "tiny" / "config.json").exists():
        import ray

        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
        save_cold_started(folder / "tiny", steps)
        ray.shutdown()
    for size in sizes:
        if not (folder / size / "config.json").exists():
            save_widened(folder / "tiny", folder / size, size)


if __name__ == "__main__":
    sys.exit(main())
