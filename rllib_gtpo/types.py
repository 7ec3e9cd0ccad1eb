"""Every concept of a rollout, named once.  Standard library only.

A *group* is the rollouts ("trajectories") of one prompt.  A trajectory is a list of *turns*.  A
turn is what the policy sampled in one go plus what the tools answered to it:

    what                                      where                          trained
    context added before the turn             Turn.prompt_ids                never
    what the policy sampled, its end as well  Turn.token_ids                 always
    what the tools answered                   prompt_ids of the next turn    never

so the token stream of a trajectory is  p0 c0 p1 c1 ... pK cK  with p = prompt_ids, c = token_ids,
and no token belongs to two turns.

"What is 2 + 3 * 4?", solved with one tool call, is two turns:

    turn 0  text "```python\\nprint(2+3*4)\\n```"  calls [ToolCall("python", ...)]  results ["14"]
    turn 1  text "14"                              calls []  -> answer "14", stop_reason ANSWER
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""A chat message in the Hugging Face convention: {"role", "content", optional "tool_calls"}."""

Task = dict[str, Any]
"""One row of a dataset.  `task["id"]` names it; see `rllib_gtpo.env.task_id`."""


class StopReason(StrEnum):
    """Why a trajectory ended.  Everything but ANSWER and ENV_DONE counts as truncated."""

    ANSWER = "answer"  # the policy answered: a turn without a tool call
    ENV_DONE = "env_done"  # the environment ended it
    MAX_TURNS = "max_turns"
    TURN_TRUNCATED = "turn_truncated"  # a turn reached max_turn_tokens
    MAX_TOKENS = "max_tokens"  # the context is full
    ENV_ERROR = "env_error"  # the environment raised
    ENV_TIMEOUT = "env_timeout"  # the environment did not return
    INVALID_CALLS = "invalid_calls"  # too many turns in a row whose calls were all invalid
    ENGINE_ERROR = "engine_error"  # the engine failed and could not be replaced in time
    DROPPED = "dropped"  # others were faster: see the setting `stragglers`


class ToolError(StrEnum):
    """What went wrong with a tool call, if anything did."""

    INVALID = "invalid"  # cannot be parsed, unknown tool, or violates the schema: a *format* error
    RAISED = "raised"  # well-formed, and the tool (or the code it ran) raised
    TIMEOUT = "timeout"  # well-formed, and the tool did not return in time
    CRASHED = "crashed"  # well-formed, and the process in which it ran died of it


_BROKEN = (StopReason.ENV_ERROR, StopReason.ENV_TIMEOUT, StopReason.ENGINE_ERROR)


@dataclass(slots=True)
class ToolCall:
    """A call as the policy wrote it.  `error` says why it is invalid; then `arguments` may be
    empty."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    raw: str = ""  # the exact text of the call in the turn
    error: str | None = None
    id: str | None = None  # in formats that have one (Mistral's)


@dataclass(slots=True)
class ToolResult:
    """What a call gave back.  `content` is the text that the policy sees."""

    name: str
    content: str
    error: ToolError | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Observation:
    """What the environment adds to the conversation: new messages only, never the transcript."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(
        default_factory=list
    )  # JSON schemas; first observation only


@dataclass(slots=True)
class Completion:
    """What an engine sampled: ids and the log-probability of each under the sampling
    distribution."""

    token_ids: list[int]
    logprobs: list[float]
    finish: str  # "stop": ended with a stop token (kept, last) | "length": hit max_tokens | "abort"
    weights_version: int = 0  # of the weights that sampled the first token
    last_version: int | None = None  # of those that sampled the last one, if they are others


@dataclass(slots=True)
class Turn:
    """One action of the policy and what came of it.  `rewards` holds every component by name."""

    index: int
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "stop"
    weights_version: int = 0  # see Completion
    last_version: int | None = None
    text: str = ""  # the sampled text without its stop token
    content: str = ""  # text without thinking and without calls
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)  # from the request to its completion

    @property
    def reward(self) -> float:
        """The turn's reward: the sum of its components, the only number that enters a return."""
        return sum(self.rewards.values())

    @property
    def invalid(self) -> bool:
        """Whether any call of the turn is invalid (unparsable, unknown or against its schema)."""
        return any(c.error is not None for c in self.calls) or any(
            r.error is ToolError.INVALID for r in self.results
        )


@dataclass(slots=True)
class Trajectory:
    """One rollout of a task."""

    task: Task
    group_id: int = 0
    member: int = 0
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason | None = None
    answer: str | None = None  # None if the trajectory was truncated
    correct: bool = False
    error: str = ""  # message of the exception behind ENV_ERROR
    similarities: dict[int, float] = field(default_factory=dict)
    """Of what shaping compares, to each correct sibling's, by member; empty if not shaped."""

    @property
    def truncated(self) -> bool:
        """Whether something other than the policy or the task ended it."""
        return self.stop_reason not in (StopReason.ANSWER, StopReason.ENV_DONE)

    @property
    def broken(self) -> bool:
        """Whether environment or engine failed: the outcome says nothing about the policy."""
        return self.stop_reason in _BROKEN

    @property
    def weights_versions(self) -> tuple[int, int]:
        """The oldest and the newest weights that sampled any of it; equal unless it spans an
        update."""
        seen = [v for t in self.turns for v in (t.weights_version, t.last_version) if v is not None]
        return min(seen, default=0), max(seen, default=0)

    @property
    def reward(self) -> float:
        """Undiscounted sum of the turn rewards; equals the RLlib episode's return."""
        return sum(t.reward for t in self.turns)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, context included."""
        return sum(len(t.prompt_ids) + len(t.token_ids) for t in self.turns)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(len(t.token_ids) for t in self.turns)

    @property
    def code(self) -> str:
        """The code (or other string arguments) of all valid calls, in order: shaping compares
        it."""
        return "\n".join(
            value
            for turn in self.turns
            for call in turn.calls
            if call.error is None
            for value in call.arguments.values()
            if isinstance(value, str)
        )


@dataclass(slots=True)
class Group:
    """All rollouts of one prompt; the unit of normalisation, sampling, sharding and loss."""

    id: int
    task: Task
    trajectories: list[Trajectory]

    @property
    def num_tokens(self) -> int:
        """Tokens of all members."""
        return sum(t.num_tokens for t in self.trajectories)


def flat_turns(groups: Sequence[Group]) -> list[Turn]:
    """All turns of `groups` in the one order that rewards, credit and packing share."""
    return [turn for g in groups for trajectory in g.trajectories for turn in trajectory.turns]
