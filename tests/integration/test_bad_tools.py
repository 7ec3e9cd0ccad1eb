"""Training goes on whatever a tool does; one that cannot work here ends the run at its start."""

from __future__ import annotations

import sys
import time

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.tools import MCPServer, ToolSchemaError, tool
from rllib_gtpo.types import ToolError
from tests.tasks import Adder


@tool(timeout=0.05, output_chars=60)
def add(a: int, b: int) -> str:
    """Add two numbers.  a: the first.  b: the second."""
    match (a + b) % 5:
        case 0:
            time.sleep(5)
        case 1:
            raise SystemExit("leaving")
        case 2:
            raise KeyboardInterrupt
        case 3:
            return "9" * 100_000_000
    return str(a + b)


class Hostile(Adder):
    tools = [add]


def config(model, env):
    return (
        GTPOConfig()
        .environment(env)
        .language_model(model=model)
        .rollouts(max_turn_tokens=64)
        .training(lr=1e-3, group_size=4, groups_per_step=10)
        .reporting(progress=False)
        .debugging(seed=1)
    )


def test_a_step_with_hostile_tools(adder_model):
    algorithm = config(adder_model, Hostile).build_algo()
    result = algorithm.train()
    trajectories = algorithm.learner_group._learner.last_batch.trajectories
    algorithm.stop()
    assert len(trajectories) == 40 and result["trajectory"]["discarded"] == 0
    results = [r for t in trajectories for turn in t.turns for r in turn.results]
    seen = {(r.error, r.content[:9]) for r in results if r.error is not ToolError.INVALID}
    assert {
        (ToolError.TIMEOUT, "Error: ti"),
        (ToolError.RAISED, "Error: Sy"),
        (ToolError.RAISED, "Error: Ke"),
        (None, "9" * 9),
    } <= seen
    assert all(r.seconds < 4 and len(r.content) <= 60 for r in results if r.name == "add")


class Unimportable(Adder):
    tools = ["no_such_shop.stock:count"]


class Serverless(Adder):
    tools = [MCPServer([sys.executable, "-c", "import sys; sys.exit('no licence')"])]


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        (Unimportable, ToolSchemaError, "'no_such_shop.stock:count': importing .* raised Module"),
        (Serverless, EnvironmentFault, r"(?s)does not start: .*stderr ended with:\nno licence"),
    ],
)
def test_what_cannot_work_ends_the_run_before_it_starts(adder_model, env, error, message):
    with pytest.raises(error, match=message):
        config(adder_model, env).build_algo()
