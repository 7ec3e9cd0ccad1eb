import asyncio
import time

import gymnasium as gym
import pytest

from rllib_gtpo import ToolEnv
from rllib_gtpo.env import task_id
from rllib_gtpo.errors import DataError, EnvironmentFault, RewardError
from rllib_gtpo.rewards import Rubric
from rllib_gtpo.text_env import as_tool_env
from rllib_gtpo.tools import ToolSchemaError, tool
from rllib_gtpo.types import Group, StopReason, ToolError, Turn


def search(query: str) -> str:
    """Search the handbook.  query: what to look for."""
    if query == "boom":
        raise KeyError("no such page")
    return f"page about {query}"


class Handbook(ToolEnv):
    tools = [search]
    max_turns = 3

    def tasks(self, split):
        return [{"question": "capital of France?", "answer": "Paris"}]


CALL = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call>'


def started(env: ToolEnv) -> ToolEnv:
    env.reset(options={"task": {"question": "capital of France?", "answer": "Paris"}})
    return env


class TestSteps:
    def test_reset_shows_the_prompt_and_the_tools(self):
        observation, _ = Handbook().reset(seed=0)
        assert observation.messages == [{"role": "user", "content": "capital of France?"}]
        function = observation.tools[0]["function"]
        assert function["name"] == "search"
        assert function["parameters"]["properties"]["query"]["description"] == "what to look for."

    def test_a_call_is_answered_and_the_answer_ends_it(self):
        env = started(Handbook())
        observation, reward, terminated, truncated, _ = env.step(CALL % "France")
        assert observation.messages == [
            {"role": "tool", "name": "search", "content": "page about France"}
        ]
        assert (reward, terminated, truncated) == (0.0, False, False)
        _, reward, terminated, truncated, _ = env.step("Paris")
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert env.trajectory.answer == "Paris" and env.trajectory.correct
        assert env.trajectory.stop_reason is StopReason.ANSWER

    def test_no_tool_on_the_first_turn_costs_the_format_penalty(self):
        env = started(Handbook())
        _, reward, *_ = env.step("Paris")
        assert env.trajectory.turns[0].rewards == {"format": -0.1, "accuracy": 1.0}
        assert reward == pytest.approx(0.9)

    def test_a_later_turn_without_a_call_costs_nothing(self):
        env = started(Handbook())
        env.step(CALL % "x")
        env.step("London")
        assert env.trajectory.turns[1].rewards == {"format": 0.0, "accuracy": 0.0}

    @pytest.mark.parametrize(
        "text",
        [
            "<tool_call>{",
            '<tool_call>{"name": "serach", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "search", "arguments": {"query": 3}}</tool_call>',
            '<tool_call>{"name": "search", "arguments": {}}</tool_call>' * 2,
        ],
    )
    def test_an_invalid_call_costs_once_and_the_policy_is_told(self, text):
        env = started(Handbook())
        observation, reward, terminated, truncated, _ = env.step(text)
        assert reward == pytest.approx(-0.1)
        assert not terminated and not truncated
        assert observation.messages[0]["content"]
        assert env.trajectory.turns[0].invalid

    def test_a_tool_that_raises_is_not_a_format_error(self):
        env = started(Handbook())
        observation, reward, *_ = env.step(CALL % "boom")
        assert "KeyError" in observation.messages[0]["content"]
        assert reward == 0.0
        env = started(Handbook())
        env.rubric = Rubric(penalize_tool_errors=0.3)
        assert env.step(CALL % "boom")[1] == pytest.approx(-0.3)

    def test_the_turn_limit_truncates_and_there_is_no_answer(self):
        env = started(Handbook())
        for _ in range(2):
            assert env.step(CALL % "x")[2:4] == (False, False)
        assert env.step(CALL % "x")[2:4] == (False, True)
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS
        assert env.trajectory.answer is None and not env.trajectory.correct

    def test_a_truncated_turn_runs_no_tools(self):
        env = started(Handbook())
        _, _, terminated, truncated, _ = asyncio.run(
            env.astep(Turn(0, text="Par", content="Paris", finish="length"))
        )
        assert (terminated, truncated) == (False, True)
        assert env.trajectory.answer is None and env.trajectory.reward == pytest.approx(-0.1)

    def test_steps_after_the_end_are_refused(self):
        env = started(Handbook())
        env.step("Paris")
        with pytest.raises(EnvironmentFault, match="reset"):
            env.step("again")

    def test_a_hanging_tool_is_an_error_that_the_policy_sees(self):
        class Slow(Handbook):
            tool_timeout = 0.05

            def wait(self, seconds: float) -> str:
                """Wait."""
                time.sleep(seconds)
                return "done"

            tools = [wait]

        env = started(Slow())
        body = '{"name": "wait", "arguments": {"seconds": 3}}'
        began = time.perf_counter()
        observation, *_ = env.step(f"<tool_call>{body}</tool_call>")
        assert "timed out" in observation.messages[0]["content"]
        assert time.perf_counter() - began < 2

    def test_tools_may_be_methods_with_state_per_trajectory(self):
        class Counter(ToolEnv):
            def count(self, by: int) -> int:
                """Count.  by: how much."""
                self.total = getattr(self, "total", 0) + by
                return self.total

            tools = [count]

        one, other = started(Counter()), started(Counter())
        call = '<tool_call>{"name": "count", "arguments": {"by": 2}}</tool_call>'
        one.step(call)
        assert one.step(call)[0].messages[0]["content"] == "4"
        assert other.step(call)[0].messages[0]["content"] == "2"

    def test_two_tools_of_one_name_are_refused_with_both(self):
        def other(query: str) -> str:
            """Search elsewhere."""

        other.__name__ = "search"

        class Twice(Handbook):
            tools = [search, other]

        with pytest.raises(
            ToolSchemaError, match=r"Twice.tools has two tools named 'search': <f.*> and <f.*>\."
        ):
            Twice()

    def test_a_tool_may_be_named_by_its_module(self):
        class Sums(ToolEnv):
            tools = ["tests.tasks:add"]

        env = started(Sums())
        call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
        assert env.step(call)[0].messages[0]["content"] == "5"

    def test_a_tools_own_limits_go_before_the_environments(self):
        class Slow(Handbook):
            tool_timeout = 60.0
            tool_output_chars = 10

            @tool(timeout=0.05)
            async def wait(self) -> str:
                """Wait."""
                await asyncio.sleep(60)

            @tool(output_chars=500)
            def talk(self) -> str:
                """Talk."""
                return "x" * 900

            def mutter(self) -> str:
                """Mutter."""
                return "x" * 900

            tools = [wait, talk, mutter]

        env = started(Slow())
        names = ("wait", "talk", "mutter")
        calls = [f'<tool_call>{{"name": "{n}", "arguments": {{}}}}</tool_call>' for n in names]
        contents = [m["content"] for m in env.step("".join(calls))[0].messages]
        results = env.trajectory.turns[0].results
        assert [r.error for r in results] == [ToolError.TIMEOUT, None, None]
        assert results[0].seconds < 5 and [len(c) for c in contents] == [10, 500, 10]

    def test_works_where_a_loop_is_running(self):
        async def notebook():
            return started(Handbook()).step("Paris")[1]

        assert asyncio.run(notebook()) == pytest.approx(0.9)


INVALID = '<tool_call>{"name": "serach", "arguments": {}}</tool_call>'


class TestInvalidCalls:
    class Strict(Handbook):
        max_turns = 20
        max_invalid_calls = 2

    @pytest.mark.parametrize(
        ("turns", "ends_after"),
        [
            ([INVALID, INVALID, INVALID], 2),
            ([INVALID, CALL % "x", INVALID, INVALID], 4),
            ([CALL % "boom", CALL % "boom", CALL % "boom"], None),  # it raises: that is valid
            ([INVALID + CALL % "x", INVALID + CALL % "x", INVALID], None),  # not all of a turn's
            (["<tool_call>{", INVALID], 2),
        ],
    )
    def test_only_turns_in_a_row_end_it(self, turns, ends_after):
        env = started(self.Strict())
        for number, turn in enumerate(turns, start=1):
            _, reward, terminated, truncated, _ = env.step(turn)
            assert not terminated and truncated == (number == ends_after)
            if truncated:
                break
        if ends_after is None:
            assert env.trajectory.stop_reason is None
        else:
            assert len(env.trajectory.turns) == ends_after
            assert env.trajectory.stop_reason is StopReason.INVALID_CALLS
            assert env.trajectory.truncated and env.trajectory.answer is None
            assert not env.trajectory.broken and reward == pytest.approx(-0.1)

    def test_by_default_there_is_no_limit_but_the_turns(self):
        env = started(Handbook())
        for _ in range(3):
            env.step(INVALID)
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS

    def test_it_goes_before_the_limit_of_turns(self):
        env = started(self.Strict())
        env.turn_limit = 2
        env.step(INVALID)
        env.step(INVALID)
        assert env.trajectory.stop_reason is StopReason.INVALID_CALLS


class TestRewards:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (1.0, "dict of named components"),
            ({"accuracy": float("nan")}, "finite"),
            ({"format": 1.0}, "already taken"),
            ({3: 1.0}, "names are strings"),
        ],
    )
    def test_bad_rewards_are_refused(self, value, message):
        class Bad(Handbook):
            def reward(self, trajectory, task):
                return value

        with pytest.raises(RewardError, match=message):
            started(Bad()).step("Paris")

    def test_group_rewards_go_to_last_turns(self):
        class Grouped(Handbook):
            def group_reward(self, group):
                return [{"rank": float(i)} for i, _ in enumerate(group.trajectories)]

        envs = [started(Grouped()), started(Grouped())]
        for env in envs:
            env.step(CALL % "x")
            env.step("Paris")
        group = Group(0, {}, [env.trajectory for env in envs])
        asyncio.run(envs[0].rubric.score_group(envs[0], group))
        assert [t.turns[-1].rewards["rank"] for t in group.trajectories] == [0.0, 1.0]
        assert "rank" not in group.trajectories[1].turns[0].rewards


class TestAsynchronousRewards:
    class Judged(Handbook):
        """Every reward waits for a judge."""

        async def reward(self, trajectory, task):
            await asyncio.sleep(self.env_config.get("seconds", 0.0))
            return {"accuracy": float(trajectory.answer == task["answer"])}

        async def turn_reward(self, turn, task):
            await asyncio.sleep(0)
            return {"calls": float(len(turn.calls))}

        async def group_reward(self, group):
            await asyncio.sleep(0)
            return [{"rank": float(i)} for i, _ in enumerate(group.trajectories)]

    def test_they_count_like_any_other(self):
        env = started(self.Judged())
        env.step(CALL % "France")
        assert env.step("Paris")[1] == 1.0
        assert [t.rewards for t in env.trajectory.turns] == [
            {"format": 0.0, "calls": 1.0},
            {"format": 0.0, "calls": 0.0, "accuracy": 1.0},
        ]
        assert env.trajectory.correct
        group = Group(0, {}, [env.trajectory])
        asyncio.run(env.rubric.score_group(env, group))
        assert env.trajectory.turns[-1].rewards["rank"] == 0.0

    def test_a_trajectory_that_is_ended_from_outside_is_scored(self):
        env = started(self.Judged())
        env.step(CALL % "France")
        env.end(StopReason.MAX_TOKENS)
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "calls": 1.0, "accuracy": 0.0}

    def test_while_one_waits_the_others_go_on(self):
        envs = [started(self.Judged({"seconds": 0.5})) for _ in range(20)]

        async def all_at_once():
            await asyncio.gather(*(env.astep("Paris") for env in envs))

        began = time.perf_counter()
        asyncio.run(all_at_once())
        assert time.perf_counter() - began < 5  # one after the other it takes 10 s
        assert all(env.trajectory.correct for env in envs)

    def test_what_they_raise_reaches_the_caller(self):
        class Broken(Handbook):
            async def reward(self, trajectory, task):
                raise KeyError("no judge")

        with pytest.raises(KeyError, match="no judge"):
            started(Broken()).step("Paris")


class TestTasks:
    def test_the_id_is_the_tasks_own_or_a_hash(self):
        assert task_id({"id": 7}) == "7"
        assert task_id({"a": 1, "b": 2}) == task_id({"b": 2, "a": 1}) != task_id({"a": 2})

    def test_no_tasks_says_what_to_do(self):
        with pytest.raises(DataError, match="override tasks"):
            ToolEnv().tasks("train")

    def test_no_prompt_or_answer_says_what_to_do(self):
        with pytest.raises(DataError, match="override prompt"):
            ToolEnv().prompt({"text": "x"})
        with pytest.raises(DataError, match="override reward"):
            ToolEnv().reward(None, {"question": "x"})


class Guess(gym.Env):
    """A plain gymnasium environment with text on both sides."""

    observation_space = gym.spaces.Text(100)
    action_space = gym.spaces.Text(100)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.secret = str(int(self.np_random.integers(10)))
        return "guess a digit", {}

    def step(self, action):
        right = action == self.secret
        return ("right" if right else "wrong"), float(right), right, False, {"is_success": right}


class TestTextEnv:
    def test_a_plain_text_environment_works(self):
        env = as_tool_env(Guess())
        task = env.tasks("train")[5]
        assert not {t["id"] for t in env.tasks("train")} & {t["id"] for t in env.tasks("test")}
        env.reset(options={"task": task})
        wrong = str((int(env.inner.secret) + 1) % 10)
        observation, reward, terminated, *_ = env.step(wrong)
        assert (observation.messages[0]["content"], reward, terminated) == ("wrong", 0.0, False)
        assert env.step(env.inner.secret)[1:4] == (1.0, True, False)
        assert env.trajectory.correct and env.trajectory.stop_reason is StopReason.ENV_DONE

    def test_one_that_never_ends_is_ended(self):
        env = as_tool_env(Guess())
        env.turn_limit = 2
        env.reset(options={"task": env.tasks("train")[0]})
        assert env.step("x")[2:4] == (False, False)
        assert env.step("x")[2:4] == (False, True)

    def test_anything_else_is_refused(self):
        with pytest.raises(EnvironmentFault, match="ToolEnv"):
            as_tool_env(gym.make("CartPole-v1"))
