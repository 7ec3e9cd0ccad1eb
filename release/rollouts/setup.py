"""What the benches of the env runner share: a task with a tool whose latency is chosen, a runner of
it in this process, and an engine that is told what to say."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rllib_gtpo import GTPOConfig, ToolEnv
from rllib_gtpo.engines.base import Request, RolloutEngine
from rllib_gtpo.env_runner import GTPOEnvRunner
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import Completion

CALL = '<tool_call>{{"name": "add", "arguments": {{"a": {}, "b": {}}}}}</tool_call>'
MARKUP = (
    *("user\n", "assistant\n", "tool\n"),
    *('<tool_call>{"name": "add", "arguments": {"a": ', ', "b": ', "}}</tool_call>"),
)  # one token each


class Sum(ToolEnv):
    """Three numbers are added with two calls of a tool, which takes `latency(task, call)` s."""

    latency: ClassVar[Callable[[str, int], float]] = staticmethod(lambda task, call: 0.0)
    open: ClassVar[int] = 0  # instances that are reset and not closed

    def __init__(self, env_config: Any = None) -> None:
        super().__init__(env_config)
        self._calls = 0
        self._is_open = False

    async def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        self._calls += 1
        assert self.trajectory is not None
        name = f"{self.trajectory.task['id']}/{self.trajectory.member}"
        seconds = type(self).latency(name, self._calls)
        if seconds:
            await asyncio.sleep(seconds)
        return a + b

    tools = (add,)
    max_turns = 8

    def tasks(self, split: str) -> Sequence[dict[str, Any]]:
        """Three digits each."""
        draw = random.Random(split)
        rows = [[draw.randrange(10) for _ in range(3)] for _ in range(10_000)]
        return [{"id": f"{split}-{i}", "numbers": row} for i, row in enumerate(rows)]

    def prompt(self, task: dict[str, Any]) -> str:
        """The sum."""
        return "+".join(map(str, task["numbers"]))

    def reward(self, trajectory: Any, task: dict[str, Any]) -> dict[str, float]:
        """Whether the answer is the sum."""
        return {"accuracy": float(trajectory.answer == str(sum(task["numbers"])))}

    def expert(self, task: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Two calls and the answer."""
        a, b, c = task["numbers"]
        texts = [CALL.format(a, b), CALL.format(a + b, c), str(a + b + c)]
        results = [str(a + b), str(a + b + c)]
        messages = [{"role": "assistant", "content": texts[0]}]
        for result, text in zip(results, texts[1:], strict=True):
            messages += [
                {"role": "tool", "content": result},
                {"role": "assistant", "content": text},
            ]
        return [messages]

    def reset(self, **kwargs: Any) -> Any:
        """Counts."""
        Sum.open += not self._is_open
        self._is_open = True
        return super().reset(**kwargs)

    def close(self) -> None:
        """Counts."""
        Sum.open -= self._is_open
        self._is_open = False


def uniform(name: str, call: int) -> float:
    """A number in [0, 1) that a call of a trajectory always has."""
    return zlib.crc32(f"{name}#{call}".encode()) / 2**32


class ScriptedEngine:
    """Says what it is told, at once: all time is the runner's and the environment's.

    Every turn but the last is a call; `turns` says how many there are.
    """

    max_context = 4096

    def __init__(self, codec: Any, turns: int) -> None:
        stop = codec.end_of_turn_id
        call, answer = (
            [*codec.tokenizer.encode(text, add_special_tokens=False), stop]
            for text in (CALL.format(2, 3), "5")
        )
        self._texts = [call] * (turns - 1) + [answer]

    async def generate(self, request: Request) -> Completion:
        """The text of the turn, in the next round of the loop."""
        await asyncio.sleep(0)
        ids = self._texts[request.key[-1]]
        return Completion(list(ids), [0.0] * len(ids), "stop")

    def release(self, trajectory: str) -> None:
        """Nothing is held."""

    def weights_updated(self, version: int) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing is held."""


class BenchConfig(GTPOConfig):
    """GTPO's, with an engine of one's own making."""

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class)
        self.make_engine: Callable[[Any, Any], RolloutEngine] | None = None

    def build_engine(self, module: Any, *args: Any, **kwargs: Any) -> RolloutEngine:
        """The engine that `make_engine(codec, module)` makes, if it is set."""
        if self.make_engine is None:
            return super().build_engine(module, *args, **kwargs)
        return self.make_engine(self.build_codec(), module)


def bench_config(**rollouts: Any) -> BenchConfig:
    """The task with the tiny model that the package makes."""
    config = (
        BenchConfig()
        .environment(Sum)
        .language_model(tokenizer=build_tokenizer(MARKUP))
        .rollouts(max_turn_tokens=32, **rollouts)
        .training(group_size=8)
        .reporting(progress=False)
        .debugging(seed=0)
    )
    assert isinstance(config, BenchConfig)
    return config


def runner_of(config: BenchConfig) -> GTPOEnvRunner:
    """An env runner in this process."""
    return GTPOEnvRunner(config=config, env_creator=lambda context: Sum(context))
