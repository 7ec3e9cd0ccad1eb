"""`ToolEnv`: a task with tools, as a gymnasium environment in which one step is one turn.

    def search(query: str) -> str:
        \"\"\"Search the handbook.  query: what to look for.\"\"\"

    class Handbook(ToolEnv):
        tools = [search]
        def tasks(self, split): return rows(split)
        def prompt(self, task): return task["question"]
        def reward(self, trajectory, task): return {"accuracy": float(trajectory.answer ==
        task["answer"])}

An instance is light and serves one trajectory at a time; `tasks` is called once per rollout worker.
Reward functions may be `async def`: while one waits (for a grader, a judge), other rollouts go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym

from rllib_gtpo.aio import run_coroutine
from rllib_gtpo.chat import CallFormat, call_format
from rllib_gtpo.data import load_tasks
from rllib_gtpo.errors import DataError, EnvironmentFault, did_you_mean
from rllib_gtpo.rewards.rubric import Rubric
from rllib_gtpo.tools.run import run_calls
from rllib_gtpo.tools.toolbox import Toolbox, ToolSource
from rllib_gtpo.types import (
    Group,
    Message,
    Observation,
    StopReason,
    Task,
    ToolCall,
    ToolError,
    Trajectory,
    Turn,
)

Components = Mapping[str, float]


class ChatSpace(gym.Space[Any]):
    """The space of chat observations and turns: any text, without a numeric form."""

    def contains(self, x: Any) -> bool:
        """Whether `x` is something that a chat environment exchanges."""
        return isinstance(x, (str, Observation, Turn))

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Text cannot be sampled usefully; an empty turn is valid."""
        return ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatSpace)

    def __hash__(self) -> int:
        return hash(ChatSpace)


def task_id(task: Task) -> str:
    """The task's own id, or a hash of its content."""
    if "id" in task:
        return str(task["id"])
    text = json.dumps(task, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _all_invalid(trajectory: Trajectory, turns: int) -> bool:
    """Whether each of the last `turns` turns has calls, and all of them are invalid."""
    last = trajectory.turns[-turns:]
    return len(last) == turns and all(
        turn.calls and all(result.error is ToolError.INVALID for result in turn.results)
        for turn in last
    )


class ToolEnv(gym.Env[Any, Any]):
    """Base class of tool tasks.  Override `tasks`, `prompt`, `reward`; the rest is optional."""

    tools: ClassVar[Sequence[ToolSource]] = ()
    """What the policy can call: functions, methods, names of either, MCP servers."""
    max_turns: ClassVar[int] = 8
    """After so many turns a trajectory ends."""
    max_invalid_calls: int | None = None
    """Turns in a row with nothing but invalid calls that end it; None: no limit."""
    system: ClassVar[str | None] = None
    """System message of every conversation."""
    tool_timeout: float = 30.0
    """Seconds, of tools without a limit of their own."""
    tool_output_chars: int = 8192
    """What the policy sees of a result; the middle is left out."""

    observation_space = ChatSpace()
    action_space = ChatSpace()

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        self.env_config: dict[str, Any] = dict(env_config or {})
        self.turn_limit: int = type(self).max_turns
        self.rubric = Rubric()
        self.call_format: CallFormat = call_format("hermes")
        self.trajectory: Trajectory | None = None
        self._toolbox = Toolbox(self, self.tools)

    # What a task overrides.

    def tasks(self, split: str) -> Iterable[Task]:
        """The rows of a split ("train", "validation", "test").

        By default the rows of `env_config["tasks"]`: a path (JSON lines, Parquet), an s3://
        address, a Hugging Face dataset, or a list of dicts; `env_config["columns"]` says which
        columns become which fields (`rllib_gtpo.columns`).
        """
        if "tasks" not in self.env_config:
            raise DataError(
                f"{type(self).__name__} has no tasks: override tasks(self, split), or give "
                "env_config={'tasks': 'path/to/rows.jsonl'}."
            )
        return load_tasks(self.env_config["tasks"], split, self.env_config.get("columns"))

    def prompt(self, task: Task) -> str | list[Message]:
        """The task as a user message, or as a list of chat messages."""
        for key in ("prompt", "question", "problem"):
            if key in task:
                return task[key]  # type: ignore[no-any-return]
        raise DataError(
            f"Task {task_id(task)} has no 'prompt', 'question' or 'problem' (it has "
            f"{sorted(task)}): "
            "override prompt(self, task)."
        )

    def reward(self, trajectory: Trajectory, task: Task) -> Components | Awaitable[Components]:
        """Named components of the outcome; they go to the last turn."""
        if "answer" not in task:
            raise DataError(
                f"Task {task_id(task)} has no 'answer' (it has {sorted(task)}): override "
                "reward(self, trajectory, task)."
            )
        return {"accuracy": float(trajectory.answer == str(task["answer"]))}

    def turn_reward(
        self, turn: Turn, task: Task
    ) -> Components | Awaitable[Components | None] | None:
        """Named components of one turn, besides format."""
        return None

    def group_reward(
        self, group: Group
    ) -> Sequence[Components] | Awaitable[Sequence[Components] | None] | None:
        """Named components for each member of a finished group, for its last turn."""
        return None

    def answer(self, trajectory: Trajectory) -> str | None:
        """The final answer: the last turn without thinking and calls; None if it was truncated."""
        return None if trajectory.truncated else trajectory.turns[-1].content.strip()

    def same_answer(self, one: str, other: str, task: Task) -> bool:
        """Whether two answers count as one in a majority vote (maj@k); equal texts always do."""
        return one == other

    def correct(self, trajectory: Trajectory, task: Task) -> bool:
        """Whether the trajectory solved its task: by default an `accuracy` of at least 1."""
        return trajectory.turns[-1].rewards.get("accuracy", 0.0) >= 1.0

    def done(self, trajectory: Trajectory, task: Task) -> bool:
        """Whether the environment ends the trajectory after a turn with calls (a game that is
        over)."""
        return False

    def expert(self, task: Task) -> Iterable[list[Message] | list[str]]:
        """Demonstrations for the cold start.

        Each is a list of texts, what the policy says in each turn (`tool_call` writes calls), and
        the environment itself answers; or of the messages after the prompt, those of tools, too.
        """
        return ()

    def tool_call(self, name: str, /, **arguments: Any) -> str:
        """A call as the policy writes it, in the run's call format: for `expert`, and by hand."""
        if name not in self._toolbox.tools:
            known = did_you_mean(name, self._toolbox.tools)
            raise DataError(f"tool_call: {type(self).__name__} has no tool {name!r}{known}")
        if problem := self._toolbox.tools[name].check(arguments):
            raise DataError(f"tool_call: {problem}")
        return self.call_format.write(ToolCall(name, arguments))

    # The gymnasium interface.

    @property
    def has_tools(self) -> bool:
        """Whether the policy can call anything."""
        return bool(self.tools)

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        """The tools as JSON schemas, in the form that chat templates take."""
        return [tool.schema for tool in self._toolbox.tools.values()]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts a trajectory of `options["task"]`, or of a training task drawn by `seed`."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            rows = list(self.tasks("train"))
            if not rows:
                raise DataError(f"{type(self).__name__}.tasks('train') has no rows.")
            task = rows[int(self.np_random.integers(len(rows)))]
        self.trajectory = Trajectory(task=task)
        self._toolbox.begin_trajectory()
        return Observation(self.first_messages(task), self.tool_schemas), {}

    def first_messages(self, task: Task) -> list[Message]:
        """System message, if any, and prompt."""
        prompt = self.prompt(task)
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def step(self, action: str | Turn) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One turn, synchronously.  A string is parsed with `self.call_format`."""
        return run_coroutine(self.astep(action))

    async def astep(
        self, action: str | Turn
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One turn: runs its tool calls concurrently, scores it, and ends the trajectory if it is
        over."""
        trajectory = self.trajectory
        if trajectory is None or trajectory.stop_reason is not None:
            raise EnvironmentFault("step() needs a running trajectory: call reset() first.")
        turn = self._turn_of(action) if isinstance(action, str) else action
        turn.index = len(trajectory.turns)
        trajectory.turns.append(turn)
        truncated = turn.finish != "stop"
        if not truncated and turn.calls:
            turn.results = await run_calls(
                self._toolbox.tools,
                turn.calls,
                timeout=self.tool_timeout,
                output_chars=self.tool_output_chars,
            )
        await self.rubric.score_turn(self, trajectory, turn)
        reason = self._reason_to_stop(trajectory, turn, truncated)
        if reason is not None:
            await self.aend(reason)
        messages = [
            {"role": "tool", "name": r.name, "content": r.content}
            | ({} if call.id is None else {"tool_call_id": call.id})
            for call, r in zip(turn.calls, turn.results, strict=False)
        ]
        over = reason in (StopReason.ANSWER, StopReason.ENV_DONE)
        return Observation(messages), turn.reward, over, reason is not None and not over, {}

    def end(self, reason: StopReason) -> None:
        """`aend`, synchronously."""
        run_coroutine(self.aend(reason))

    async def aend(self, reason: StopReason) -> None:
        """Ends the trajectory and scores its outcome; whoever runs the rollout may call it, too."""
        assert self.trajectory is not None
        self.trajectory.stop_reason = reason
        self.trajectory.answer = self.answer(self.trajectory) if self.trajectory.turns else None
        await self.rubric.score_end(self, self.trajectory)

    def _reason_to_stop(
        self, trajectory: Trajectory, turn: Turn, truncated: bool
    ) -> StopReason | None:
        if truncated:
            return StopReason.TURN_TRUNCATED
        if not turn.calls:
            return StopReason.ANSWER
        if self.done(trajectory, trajectory.task):
            return StopReason.ENV_DONE
        if self.max_invalid_calls is not None and _all_invalid(trajectory, self.max_invalid_calls):
            return StopReason.INVALID_CALLS
        return StopReason.MAX_TURNS if len(trajectory.turns) >= self.turn_limit else None

    def _turn_of(self, text: str) -> Turn:
        parsed = self.call_format.parse(text, self.tool_schemas)
        return Turn(
            0, text=text, content=parsed.content, thinking=parsed.thinking, calls=parsed.calls
        )

    def close(self) -> None:
        """What a trajectory leaves is freed; an override calls this, too."""
        self.close_servers()

    def close_servers(self) -> None:
        """This environment needs no MCP server any more, or not until its tools are used again."""
        self._toolbox.close()
