"""`PythonMath`: mathematics with a Python tool, on any dataset of problems with answers.

    from rllib_gtpo_envs import PythonMath

    GTPOConfig().environment(PythonMath, env_config={
        "tasks": {
            "train": "BytedTsinghua-SIA/DAPO-Math-17k",
            "test": "HuggingFaceH4/aime_2024[train]",  # its only split is called "train"
        },
        "columns": {"train": "dapo-math-17k", "test": "aime-2024"},
    })

The model calls `python(code)` as often as it likes and answers with \\boxed{}.  Its code runs in a
sandbox, in a session that lasts as long as the trajectory.  The answer is graded by value, never
in the process that ran the model's code, and while other rollouts go on.

Without `tasks` the problems are made from a seed (see `word_problems`), with demonstrations from
which a model made from scratch can start; neither a download nor numpy nor sympy is needed.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rllib_gtpo.errors import ConfigError, refuse_unknown_keys
from rllib_gtpo.problems import load_problems
from rllib_gtpo.rewards.answer import extract_answer, shared_checker
from rllib_gtpo.sandbox import Limits
from rllib_gtpo.tools.python import PythonSession, to_tool_result
from rllib_gtpo.types import Message, Task, ToolResult, Trajectory
from rllib_gtpo_envs.chains import check_chain_knobs
from rllib_gtpo_envs.common import (
    PythonToolEnv,
    ScriptedEnv,
    check_flag,
    check_range,
    checked_knobs,
)
from rllib_gtpo_envs.word_problems import (
    DAYS,
    DEMONSTRATIONS,
    WordProblems,
    demonstrate,
    word_problems,
)

PRELOAD = ("numpy", "sympy")
"""What the code may count on where `tasks` are given, as far as it is installed."""
_GENERATED = tuple(f.name for f in fields(WordProblems))
_PLACE = "{question}"


@dataclass(frozen=True)
class Knobs(WordProblems):
    """What `env_config` may hold.

    tasks: Where the problems are: whatever `rllib_gtpo.data.load_tasks` reads.  Without it they are
        made from a seed.
    columns: Which columns hold "question" and "answer": the name of a ready mapping, a mapping, or
        one of these for each split; see `rllib_gtpo.columns`.
    session: Whether variables and imports stay from one call to the next.  If not, every call
        runs on its own.
    sandbox: The address of a SandboxFusion service that runs the code, instead of this machine; it
        keeps no session and imports nothing before.
    limits: What one call may use, any of `rllib_gtpo.sandbox.Limits`, such as
        {"cpu_seconds": 5, "memory_mb": 1024, "output_chars": 4096}.
    preload: Modules that are imported before the first call; by default numpy and sympy, as far as
        they are installed, where `tasks` and no `sandbox` are given.
    instructions: Whether a system message explains the tool; by default where `tasks` are given.
    system: A system message of your own instead.
    prompt_template: The user's message, with {question} where the problem belongs.

    The others are for problems made from a seed, and have no effect with `tasks`:

    seed: Problems are a function of it and of the split's name.
    operations: Fewest and most days of a problem, within 1 to 7.
    numbers: Smallest and largest number of a problem, within 0 to 99999.
    factors: The same for a number that multiplies.
    operators: Those to choose from; any of "+-*".
    largest: No intermediate result is above it, and none is below 0.
    train, validation, test: Problems in each split.
    demonstrations: Weight of each behaviour in demonstrations; one that is left out is 0.
    """

    tasks: Any = None
    columns: Any = None
    session: bool = True
    sandbox: Any = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    instructions: bool = False
    system: str | None = None
    prompt_template: str = _PLACE

    @staticmethod
    def of(env_config: Mapping[str, Any]) -> Knobs:
        """Checked knobs; ConfigError says what is valid."""
        refuse_unknown_keys("env_config", env_config, [f.name for f in fields(Knobs)])
        given = dict(env_config)
        if given.get("tasks") is not None:
            useless = [name for name in _GENERATED if name in given]
            if useless:
                raise ConfigError(
                    f"env_config: {', '.join(useless)}: without effect where `tasks` are given; "
                    "leave out the one or the other."
                )
            if given.get("sandbox") is None:
                given.setdefault("preload", [m for m in PRELOAD if importlib.util.find_spec(m)])
            given.setdefault("instructions", given.get("system") is None)
        elif given.get("columns") is not None:
            raise ConfigError("env_config: columns has no effect without `tasks`.")
        knobs = checked_knobs(Knobs, given, DEMONSTRATIONS)
        check_range("operations", knobs.operations, 1, len(DAYS))
        check_chain_knobs(knobs)
        check_flag("session", knobs.session)
        knobs._check_texts()
        knobs._check_python()
        return knobs

    def python_limits(self) -> Limits:
        """What one call may use."""
        usual = PythonToolEnv.python_limits if self.tasks is None else Limits()
        return replace(usual, **self.limits)

    def problems(self) -> WordProblems:
        """What problems are made from, without the rest."""
        return WordProblems(**{name: getattr(self, name) for name in _GENERATED})

    def _check_texts(self) -> None:
        if self.system is not None and not isinstance(self.system, str):
            raise ConfigError(f"env_config: system={self.system!r}: a text.")
        if self.system is not None and self.instructions:
            raise ConfigError("env_config: system stands in the place of instructions: choose one.")
        template = self.prompt_template
        if not isinstance(template, str) or template.count(_PLACE) != 1:
            raise ConfigError(
                f"env_config: prompt_template={template!r}: a text with {_PLACE} in it, once."
            )

    def _check_python(self) -> None:
        if not isinstance(self.limits, Mapping):
            raise ConfigError(f"env_config: limits={self.limits!r}: a number for each limit.")
        refuse_unknown_keys("env_config: limits", self.limits, [f.name for f in fields(Limits)])
        for name, value in self.limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"env_config: limits: {name}={value!r}: a number.")
        names = self.preload
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"env_config: preload={names!r}: a list of modules.")
        for name in names:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise ConfigError(
                    f"env_config: preload: there is no module {name!r} here: install it on every "
                    "machine that runs rollouts, or leave it out."
                )
        PythonSession(  # refuses what does not go together
            self.python_limits(), names, sandbox=self.sandbox, stateful=self.session
        ).close()


class PythonMath(PythonToolEnv, ScriptedEnv):
    """Mathematical problems with a Python tool.  `env_config`: see `Knobs`."""

    knobs: Knobs

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.knobs = knobs = Knobs.of(self.env_config)
        self.generated = knobs.tasks is None
        if self.generated:
            self.turn_limit = knobs.operations[1] + 3
        self.python_limits = knobs.python_limits()
        self.python_preload = knobs.preload
        self.python_stateful = knobs.session
        self.python_service = knobs.sandbox
        # The sandbox ends a call and says why, and a call may have to wait before it runs: whoever
        # waits for both must have more patience.
        self.tool_timeout = self.python_limits.wall + 60.0
        self.tool_output_chars = self.python_limits.output_chars

    def tasks(self, split: str) -> Iterable[Task]:
        """Rows with "question" and "answer"; what is also held out is left out of training."""
        if self.generated:
            return [dict(row) for row in word_problems(self.knobs.problems(), split)]
        return load_problems(self.knobs.tasks, split, self.knobs.columns)

    def prompt(self, task: Task) -> list[Message]:
        """The system message, if there is one, and the problem in its template."""
        text = self.knobs.prompt_template.replace(_PLACE, str(task["question"]))
        system = self.instructions() if self.knobs.instructions else self.knobs.system
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": text}]

    def instructions(self) -> str:
        """What the system message says about the tool, in the call format in use."""
        limits = self.python_limits
        state = (
            "Variables and imports stay from one call to the next."
            if self.python_stateful
            else "Every call runs on its own: define and import again what you need."
        )
        modules = f" You may import {' and '.join(self.python_preload)}." * bool(
            self.python_preload
        )
        return (
            "Solve the problem. You can run Python code by calling the python tool:\n"
            f"{self.call('print(2**10)')}\n"
            "Your message ends with the call; the next message shows what the code printed. "
            f"{state}{modules} A call may take {limits.cpu_seconds:g} seconds and "
            f"{limits.memory_mb:g} MB of memory. When you are sure of the answer, write it as "
            "\\boxed{answer}, in a message without a call."
        )

    async def python(self, code: str) -> ToolResult:
        """Run Python code and see what it prints.  code: the code; print what you want to see."""
        result = to_tool_result(await self.run_python(code))
        text = result.content.strip("\n")
        if self.generated and result.error is not None:  # the last line of a traceback says it all
            text = text.rpartition("\n")[2]
        return replace(result, content=text or "(no output)")

    tools = (python,)

    def answer(self, trajectory: Trajectory) -> str | None:
        """The content of \\boxed{}, or what else the last message marks as its answer."""
        text = super().answer(trajectory)
        return None if text is None else extract_answer(text)

    def same_answer(self, one: str, other: str, task: Task) -> bool:
        """Whether they have the same value."""
        return shared_checker().check(one, other).correct

    async def reward(self, trajectory: Trajectory, task: Task) -> dict[str, float]:
        """1 for an answer of the right value; grading holds up no other rollout."""
        if trajectory.answer is None:
            return {"accuracy": 0.0}
        verdict = await shared_checker().acheck(trajectory.answer, str(task["answer"]))
        return {"accuracy": float(verdict.correct)}

    def expert(self, task: Task) -> Iterable[list[Message]]:
        """Demonstrations of generated problems; for a dataset, give `cold_start` a file."""
        return super().expert(task) if self.generated else ()

    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour, on a generated problem."""
        return demonstrate(
            task,
            behaviour,
            rng,
            session=self.python_stateful,
            call=self.call,
            unclosed=self.unclosed,
        )
