"""An env runner over an engine that says what it is told to: no model is run."""

from __future__ import annotations

import asyncio

from rllib_gtpo import GTPOConfig
from rllib_gtpo.env_runner import GTPOEnvRunner
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import Completion
from tests.tasks import MARKUP

CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


class ScriptedEngine:
    """Answers each request with the text that `script(position, member, turn)` gives.

    Every attempt to roll out a member gets the same.  `delay` is how long it takes; `fail(request)`
    may return an error to raise.  `active` and `peak` count pending requests.
    """

    def __init__(self, codec, script, *, max_context=512, delay=0.0, fail=None):
        self.codec, self.script, self.max_context = codec, script, max_context
        self.delay, self.fail = delay, fail
        self.version = 0
        self.active = self.peak = 0
        self.requests, self.released = [], set()

    async def generate(self, request):
        self.requests.append((request.key, list(request.token_ids)))
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await asyncio.sleep(self.delay)
            error = self.fail(request) if self.fail else None
            if error is not None:
                raise error
        finally:
            self.active -= 1
        position, member, turn = request.key[3], request.key[4], request.key[-1]
        ids = self.ids(self.script(position, member, turn))
        cut = ids[: request.sampling.max_tokens]
        finish = "stop" if len(cut) == len(ids) else "length"
        return Completion(cut, [0.0] * len(cut), finish, self.version)

    def ids(self, text):
        encoded = self.codec.tokenizer.encode(text, add_special_tokens=False)
        return [*encoded, self.codec.end_of_turn_id]

    def release(self, trajectory):
        self.released.add(trajectory)

    def weights_updated(self, version):
        self.version = version

    def close(self):
        pass


def two_calls(position, member, turn):
    """Two calls of `add`, then the answer."""
    return CALL if turn < 2 else "5"


class ScriptedConfig(GTPOConfig):
    """Its runners have a `ScriptedEngine`; `.scripted(...)` says which."""

    def __init__(self, algo_class=None):
        super().__init__(algo_class)
        self.script, self.engine_options = two_calls, {}

    def scripted(self, script=two_calls, **options):
        self.script, self.engine_options = script, options
        return self

    def build_engine(self, module):
        return ScriptedEngine(self.build_codec(), self.script, **self.engine_options)


def scripted_config(env, *, group_size=4, **rollouts):
    """A config without progress bars, for a training runner of `env`."""
    return (
        ScriptedConfig()
        .environment(env)
        .language_model(tokenizer=build_tokenizer(MARKUP))
        .rollouts(**{"max_turn_tokens": 64, **rollouts})
        .training(group_size=group_size, groups_per_step=4)
        .reporting(progress=False)
        .debugging(seed=1)
    )


def scripted_runner(config):
    """A runner in this process."""
    return GTPOEnvRunner(config=config, env_creator=lambda context: config.env(context))
