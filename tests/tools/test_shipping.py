"""What cannot go to other processes is refused before a run, by name."""

import threading

import pytest

from rllib_gtpo import GTPOConfig, ToolEnv
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.tools import Tool
from tests.tasks import Adder


class Client:
    def __init__(self):
        self.lock = threading.Lock()

    def search(self, query: str) -> str:
        """Search."""
        return query


def closure():
    lock = threading.Lock()

    def search(query: str) -> str:
        """Search."""
        with lock:
            return query

    return search


def through_an_object():
    client = Client()

    def search(query: str) -> str:
        """Search."""
        return client.search(query)

    return search


def config(env, **env_config):
    return GTPOConfig().environment(env, env_config=env_config)


@pytest.mark.parametrize(
    ("tool", "variable"),
    [
        (closure(), "lock"),
        (through_an_object(), "client.lock"),
        (Client().search, "lock"),
        (Tool.from_function(closure()), "lock"),
    ],
)
def test_the_tool_and_its_variable_are_named(tool, variable):
    class Handbook(ToolEnv):
        tools = [tool]

    with pytest.raises(ConfigError) as info:
        config(Handbook).validate()
    told = str(info.value)
    assert told.startswith("Tool 'search' of Handbook cannot be sent to other processes")
    assert f"its '{variable}' is a _thread.lock." in told
    assert "reset()" in told and "tools = ['package.module:search']" in told


def test_whatever_else_the_environment_holds_is_named():
    class Handbook(Adder):
        lock = threading.Lock()

    with pytest.raises(ConfigError, match=r"^Handbook cannot be sent .* its 'lock' is a _thread"):
        config(Handbook).validate()
    with pytest.raises(ConfigError, match=r"^env_config\['client'\] .* its 'lock' is a _thread"):
        config(Adder, client=Client()).validate()


def test_what_every_process_can_make_for_itself_is_fine():
    class Handbook(Adder):
        tools = ["tests.tasks:add"]

        def reset(self, **kwargs):
            self.lock = threading.Lock()
            return super().reset(**kwargs)

    config(Handbook).validate()
    config(Adder, tasks=[{"a": 1}]).validate()
