"""A sandbox that heals is told in the results of the iteration."""

from __future__ import annotations

import os
import signal

from rllib_gtpo.sandbox import Limits
from rllib_gtpo.tools.python import shared_sandbox


def test_a_lost_sandbox_is_counted_once(adder_config):
    sandbox = shared_sandbox(Limits(cpu_seconds=1.0), ())
    algorithm = adder_config().env_runners(num_env_runners=0).build_algo()
    try:
        os.kill(sandbox._pool.zygote.pid, signal.SIGKILL)
        assert sandbox.run("print(1)").output == "1\n"
        counted = [
            algorithm.train()["env_runners"].get("sandbox_restarts"),
            algorithm.train()["env_runners"].get("sandbox_restarts"),
        ]
        assert counted == [1, 0]
    finally:
        algorithm.stop()
