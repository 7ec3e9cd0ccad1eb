"""A runner that dies of its tool, tools whose own process crashes, and an environment that raises,
in one run: it goes on, and counts each by its kind."""

from __future__ import annotations

import os
from pathlib import Path

from rllib_gtpo import GTPOConfig
from rllib_gtpo.sandbox import Limits
from rllib_gtpo.tools.python import PythonSession, to_tool_result
from rllib_gtpo.types import ToolError
from tests.tasks import Adder


class Unlucky(Adder):
    """The first call of all ends the env runner; sums of 4 crash in the sandbox; a question that
    begins with 3 breaks the environment."""

    async def astep(self, action):
        if self.trajectory.task["question"].startswith("3"):
            raise RuntimeError("the database is down")
        return await super().astep(action)

    async def add(self, a: int, b: int):
        """Add two numbers.  a: the first.  b: the second."""
        if _first_of_all(Path(self.env_config["folder"])):
            os._exit(1)
        if a + b != 4:
            return str(a + b)
        session = PythonSession(Limits(cpu_seconds=1.0))
        try:
            return to_tool_result(await session.arun("import ctypes; ctypes.string_at(0)"))
        finally:
            session.close()

    tools = [add]


def _first_of_all(folder):
    try:
        os.close(os.open(folder / "called", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def test_whatever_breaks_is_counted_by_its_kind_and_training_goes_on(adder_model, tmp_path):
    algorithm = (
        GTPOConfig()
        .environment(Unlucky, env_config={"folder": str(tmp_path)})
        .language_model(model=adder_model)
        .rollouts(max_turn_tokens=64)
        .env_runners(num_env_runners=2)
        .training(lr=1e-3, group_size=4, groups_per_step=10)
        .reporting(progress=False)
        .debugging(seed=1)
        .build_algo()
    )
    first, second = algorithm.train(), algorithm.train()
    trained = algorithm.learner_group._learner.last_batch.trajectories
    algorithm.stop()
    assert first["fault"]["lost_runners"] == 1
    assert first["group"]["lost_and_resampled"] > 0
    assert first["fault"]["tool_crashes"] > 0
    assert first["fault"]["env_errors"] >= 4 * first["group"]["incomplete"] > 0
    assert first["fault"]["env_timeouts"] == first["fault"]["engine_errors"] == 0
    assert second["fault"]["lost_runners"] == second["group"]["lost_and_resampled"] == 0
    assert [r["env_runners"]["num_episodes"] for r in (first, second)] == [40, 40]
    assert len(trained) == 40 and not any(t.broken for t in trained)
    crashed = [r for t in trained for turn in t.turns for r in turn.results]
    assert second["fault"]["tool_crashes"] >= sum(r.error is ToolError.CRASHED for r in crashed)
    assert first["grad"]["norm"] > 0
