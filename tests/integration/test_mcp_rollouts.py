"""Training rollouts whose tool is a published MCP server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rllib_gtpo import GTPOConfig, ToolEnv
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.tools import MCPServer
from tests.processes import gone, running

pytest.importorskip("mcp")

CLOCK = [str(Path(sys.executable).with_name("mcp-server-time")), "--local-timezone=Etc/GMT+11"]
CALL = (
    '<tool_call>{"name": "convert_time", "arguments": {"source_timezone": "Asia/Tokyo", '
    '"time": "16:30", "target_timezone": "UTC"}}</tool_call>'
)


class Clock(ToolEnv):
    """The model learns by heart whom to ask; the answer is cut so that a tiny model can see it."""

    tools = [MCPServer(CLOCK, output_chars=120)]
    max_turns = 3

    def tasks(self, split):
        return [{"id": str(i), "question": "16:30 in Tokyo?", "answer": "07:30"} for i in range(4)]

    def expert(self, task):
        asked = {"role": "assistant", "content": CALL}
        told = {"role": "tool", "content": "{}"}
        return [[asked, told, {"role": "assistant", "content": task["answer"]}]]


@pytest.mark.parametrize("runners", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_step_with_a_published_server(ray_session, runners):
    config = (
        GTPOConfig()
        .environment(Clock)
        .env_runners(num_env_runners=runners)
        .language_model(
            tokenizer=build_tokenizer((CALL, "user\n", "assistant\n", "tool\n", "07:30")),
            cold_start={"steps": 80, "batch_size": 8, "lr": 3e-3},
        )
        .rollouts(max_turn_tokens=16)
        .training(lr=1e-4, group_size=2, groups_per_step=2)
        .reporting(progress=False)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    try:
        for _ in range(3):  # until it has called the tool
            result = algorithm.train()
            trajectories = algorithm.learner_group._learner.last_batch.trajectories
            assert len(trajectories) == 4
            if any(turn.results for t in trajectories for turn in t.turns):
                break
        servers = running(" --local-timezone=Etc/GMT+11")
        # One for each process, shared by its trajectories; here none if the tools are known.
        assert 1 <= len(servers) <= 1 + runners
    finally:
        algorithm.stop()
    results = [r for t in trajectories for turn in t.turns for r in turn.results]
    answers = [r for r in results if not r.error]
    assert answers, (results, trajectories)
    assert all(r.content.startswith('{\n  "source"') for r in answers)
    assert result["tool"]["error_rate"] < 1
    assert all(gone(pid) for pid in servers)
