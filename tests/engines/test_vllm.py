"""Real vLLM engines on this machine's cores, two of them for the whole file."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import time

import pytest
import ray
import torch
from safetensors.torch import save_file

from rllib_gtpo import GTPOConfig
from rllib_gtpo.engines.base import Request, SamplingParams
from rllib_gtpo.engines.vllm import EnginePool, EngineSettings, VLLMEngine, pack_state
from rllib_gtpo.engines.vllm.device import PoolClient
from rllib_gtpo.engines.vllm.install import engine_argument_names
from rllib_gtpo.engines.vllm.weights import share
from rllib_gtpo.errors import ConfigError, EngineError
from rllib_gtpo.models import TINY_QWEN2, load_model
from tests.engines.processes import core_of
from tests.tasks import Adder

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CONTEXT = 256
PROMPT = [5 + i * 7 % 200 for i in range(80)]
_version = iter(range(1, 10_000))


def sharpened(seed, dtype="float32"):
    """A tiny model whose distributions are far from uniform and differ with the seed."""
    model = load_model(TINY_QWEN2, dtype=dtype, seed=seed).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    return model


def packed(model):
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            state[f"model.{name}"] = value
    return ray.put(pack_state(state))


def push(pool, model):
    version = next(_version)
    pool.update_weights(version, packed(model))
    return version


def settings(**options):
    given = {"dtype": "float32", "num_engines": 2, "truncates": True, **options}
    return EngineSettings(
        model=dict(TINY_QWEN2), tokenizer=None, max_context=CONTEXT, cpu=True, **given
    )


@pytest.fixture(scope="module")
def pool(ray_session):
    made = EnginePool.start(settings())
    push(made, sharpened(0))
    yield made
    made.stop()


def client(pool, **options):
    return VLLMEngine(pool.name, max_context=CONTEXT, vocab_size=266, **options)


def request(trajectory, ids=PROMPT, *, key=(1,), **sampling):
    chosen = SamplingParams(**{"max_tokens": 24, **sampling})
    return Request(trajectory, list(ids), chosen, key)


def generate(pool, *requests):
    async def run():
        engine = client(pool)
        try:
            return await asyncio.gather(*(engine.generate(r) for r in requests))
        finally:
            engine.close()

    return asyncio.run(run())


def logprobs_of(model, context, completion, temperature=1.0):
    ids = torch.tensor([list(context) + completion.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    logp = (logits / temperature).log_softmax(-1)[len(context) - 1 : -1]
    return logp.gather(-1, ids[0, len(context) :, None]).squeeze(-1)


def error(model, context, completion, temperature=1.0):
    assert completion.token_ids
    expected = logprobs_of(model, context, completion, temperature)
    return float((expected - torch.tensor(completion.logprobs)).abs().max())


def test_logprobs_are_the_learners_after_an_update(pool):
    model = sharpened(1)
    version = push(pool, model)
    done = generate(pool, *(request(f"t{i}", key=(i,)) for i in range(8)))
    assert max(error(model, PROMPT, c) for c in done) < 1e-4
    assert {c.weights_version for c in done} == {version}
    assert len({tuple(c.token_ids) for c in done}) == 8
    assert error(sharpened(0), PROMPT, done[0]) > 0.1  # of other weights they are not


def test_temperature_counts_and_truncation_does_not(pool):
    model = sharpened(2)
    push(pool, model)
    plain, cut, greedy = generate(
        pool,
        request("plain", temperature=0.7),
        request("cut", temperature=0.7, top_p=0.9),
        request("greedy", temperature=0.0, top_p=0.9),
    )
    assert error(model, PROMPT, plain, 0.7) < 1e-4
    assert error(model, PROMPT, cut, 0.7) < 1e-4
    assert error(model, PROMPT, greedy) < 1e-4
    few = generate(pool, *(request(f"few{i}", key=(i,), top_p=0.05) for i in range(6)))
    assert {tuple(c.token_ids) for c in few} == {tuple(greedy.token_ids)}  # it does truncate


def test_an_update_reaches_a_tied_output_head(pool):
    """The head keeps a packed copy of its own; only a change of the embedding shows it."""
    model = sharpened(3)
    push(pool, model)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(sharpened(4).get_input_embeddings().weight)
    push(pool, model)
    done = generate(pool, *(request(f"t{i}", key=(i,)) for i in range(4)))
    assert max(error(model, PROMPT, c) for c in done) < 1e-4


def test_the_prefix_cache_does_not_outlive_weights(pool):
    async def run():
        engine = client(pool)
        await engine.generate(request("same", max_tokens=1))
        await engine.generate(request("same", max_tokens=1))
        reused = engine.cached_tokens
        model = sharpened(5)
        await asyncio.to_thread(push, pool, model)
        done = await engine.generate(request("same"))
        engine.close()
        return reused, engine.cached_tokens - reused, error(model, PROMPT, done)

    reused, after, wrong = asyncio.run(run())
    assert reused >= 64
    assert after == 0
    assert wrong < 1e-4


def test_a_completion_that_spans_an_update_says_so(pool):
    """Before the switch its tokens are the old model's, and after it the new one's."""

    async def run():
        old, new = sharpened(6), sharpened(7)
        first = await asyncio.to_thread(push, pool, old)
        engine = client(pool)
        calls = [
            asyncio.ensure_future(engine.generate(request(f"t{i}", key=(i,), max_tokens=170)))
            for i in range(4)
        ]
        await asyncio.sleep(0.15)
        second = await asyncio.to_thread(push, pool, new)
        done = await asyncio.gather(*calls)
        engine.close()
        return old, new, first, second, done

    for _ in range(5):  # a busy machine may have finished before the update
        old, new, first, second, done = asyncio.run(run())
        spanning = [c for c in done if c.last_version is not None]
        if spanning:
            break
    assert spanning
    for completion in spanning:
        assert (completion.weights_version, completion.last_version) == (first, second)
        own = torch.tensor(completion.logprobs)
        by_old = (logprobs_of(old, PROMPT, completion) - own).abs() < 1e-4
        by_new = (logprobs_of(new, PROMPT, completion) - own).abs() < 1e-4
        switch = int(by_old.long().cumprod(0).sum())
        assert 0 < switch < len(own)
        assert by_new[switch:].all()


def test_the_same_key_gives_the_same_tokens(pool):
    push(pool, sharpened(8))
    alone = generate(pool, request("a", key=(4, 2)))[0]
    batch = generate(pool, *(request(f"b{i}", key=(4, i)) for i in range(8)))
    assert batch[2].token_ids == alone.token_ids


def test_stop_tokens_end_a_turn_and_stay(pool):
    push(pool, sharpened(9))
    free = generate(pool, request("a"))[0]
    assert free.finish == "length" and len(free.token_ids) == 24
    stop = free.token_ids[9]
    cut = generate(pool, request("a", stop_token_ids=(stop,)))[0]
    assert cut.finish == "stop"
    assert cut.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert len(cut.logprobs) == len(cut.token_ids)


def test_a_turn_ends_where_the_context_does(pool):
    push(pool, sharpened(9))
    ids = (PROMPT * 4)[: CONTEXT - 10]
    done = generate(pool, request("a", ids, max_tokens=100))[0]
    assert (len(done.token_ids), done.finish) == (10, "length")
    with pytest.raises(ValueError, match="leaves no room"):
        generate(pool, request("a", (PROMPT * 4)[:CONTEXT]))


def test_more_prompts_at_once_than_fit_into_one_step(pool):
    """vLLM would cut one in two, and on a CPU die of it, since every request has a seed."""
    before = pool.report().replaced
    calls = [request(f"t{i}", [i, *(PROMPT * 3)[:239]], key=(i,), max_tokens=2) for i in range(80)]
    done = generate(pool, *calls)
    assert [len(c.token_ids) for c in done] == [2] * 80
    assert pool.report().replaced == before


def test_trajectories_spread_over_engines_and_stay(pool):
    async def run():
        engine = client(pool)
        await asyncio.gather(*(engine.generate(request(f"t{i}")) for i in range(6)))
        before = dict(engine._homes)
        await asyncio.gather(*(engine.generate(request(f"t{i}")) for i in range(6)))
        after = dict(engine._homes)
        engine.close()
        return before, after

    before, after = asyncio.run(run())
    assert before == after
    assert sorted(before.values()) == [0, 0, 0, 1, 1, 1]


def unfinished(pool):
    return sum(ray.get([e.actor.unfinished.remote() for e in pool.report().engines]))


def test_cancelling_a_call_frees_the_engine(pool):
    async def run():
        engine = client(pool)
        calls = [
            asyncio.ensure_future(engine.generate(request(f"t{i}", max_tokens=170)))
            for i in range(8)
        ]
        await asyncio.sleep(0.1)
        for call in calls[:7]:
            call.cancel()
        done = await calls[7]
        left = await asyncio.to_thread(unfinished, pool)
        engine.close()
        return done, left

    done, left = asyncio.run(run())
    assert len(done.token_ids) == 170
    assert left == 0


def test_an_update_by_vllms_own_sender_goes_through_its_steps(pool):
    """As with NCCL and CUDA IPC; here the weights come through shared memory."""
    model = sharpened(12)
    shared = share(ray.get(packed(model)))
    version = next(_version)
    with pool.device_update() as members:
        sender = PoolClient(ray.get_actor(pool.name))
        sender.version = version
        sender.init_weight_transfer_engine({})
        sender.start_weight_update()
        sender.update_weights({"path": shared.path, "layout": shared.layout})
        sender.finish_weight_update()
    shared.close()
    assert [index for index, _ in members] == [0, 1]
    done = generate(pool, *(request(f"t{i}", key=(i,)) for i in range(4)))
    assert {c.weights_version for c in done} == {version}
    assert max(error(model, PROMPT, c) for c in done) < 1e-4


def test_requests_wait_while_engines_are_paused_or_asleep(pool):
    push(pool, sharpened(13))

    async def run(stop, go):
        engine = client(pool)
        calls = [
            asyncio.ensure_future(engine.generate(request(f"t{i}", key=(i,), max_tokens=150)))
            for i in range(4)
        ]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(stop)
        done_before = sum(call.done() for call in calls)
        late = asyncio.ensure_future(engine.generate(request("late")))
        await asyncio.sleep(0.5)
        assert sum(call.done() for call in calls) == done_before
        assert not late.done()
        await asyncio.to_thread(go)
        done = await asyncio.gather(*calls, late)
        engine.close()
        return done

    free = generate(pool, *(request(f"t{i}", key=(i,), max_tokens=150) for i in range(4)))
    for stop, go in ((pool.pause, pool.resume), (pool.sleep, pool.wake)):
        done = asyncio.run(run(stop, go))
        assert [c.token_ids for c in done[:4]] == [c.token_ids for c in free]


def test_a_cache_that_is_too_small_is_told_at_the_start(ray_session):
    small = EnginePool.start(settings(num_engines=1, options={"kv_cache_memory_bytes": 1000}))
    try:
        with pytest.raises(ConfigError, match="cannot hold one context of 256 tokens"):
            push(small, sharpened(0))
    finally:
        small.stop()


def test_names_of_engine_settings_are_vllms_own():
    assert {"max_num_seqs", "tensor_parallel_size", "enable_lora"} <= engine_argument_names()
    config = GTPOConfig().environment(Adder).rollouts(engine="vllm")
    config.validate()
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        config.rollouts(engine_config={"max_num_sequences": 4}).validate()


@pytest.fixture(scope="module")
def other_pool(ray_session):
    """One engine of another kind: bfloat16, with adapters."""
    lora = {"enable_lora": True, "max_lora_rank": 8}
    made = EnginePool.start(settings(num_engines=1, dtype="bfloat16", options=lora))
    push(made, sharpened(0, "bfloat16"))
    yield made
    made.stop()


def test_bfloat16_is_close_to_the_learners(other_pool):
    model = sharpened(14, "bfloat16")
    push(other_pool, model)
    done = generate(other_pool, *(request(f"t{i}", key=(i,)) for i in range(8)))
    assert max(error(model, PROMPT, c) for c in done) < 2e-2


def write_adapter(directory, model, seed):
    """A random adapter of the query and value projections; returns the model with it merged."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            down = torch.randn(8, module.in_features, generator=generator) / 4
            up = torch.randn(module.out_features, 8, generator=generator) / 4
            for part, value in (("lora_A", down), ("lora_B", up)):
                tensors[f"base_model.model.{name}.{part}.weight"] = value.to(module.weight.dtype)
            with torch.no_grad():
                module.weight += (2 * up @ down).to(module.weight.dtype)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_adapters_and_the_model_itself_share_a_batch(other_pool, tmp_path):
    """With all slots of adapters taken, vLLM's CPU kernel would give one to the others."""
    model = sharpened(15, "bfloat16")
    push(other_pool, model)
    merged = [write_adapter(tmp_path / f"v{n}", model, n) for n in (1, 2)]
    versions = [other_pool.load_adapter("math", tmp_path / f"v{n}") for n in (1, 2)]
    assert len({v.name for v in versions}) == 2

    async def run():
        clients = [client(other_pool, adapter=adapter) for adapter in (None, *versions)]
        done = await asyncio.gather(
            *(c.generate(request(f"t{i}", key=(i,))) for i in range(4) for c in clients)
        )
        for c in clients:
            c.close()
        return done

    done = asyncio.run(run())
    for which, expected in enumerate((model, *merged)):
        assert max(error(expected, PROMPT, c) for c in done[which::3]) < 5e-2
    assert error(model, PROMPT, done[1]) > 0.2
    other_pool.load_adapter("math", tmp_path / "v1")
    with pytest.raises(ConfigError, match="'code' is one too many"):
        other_pool.load_adapter("code", tmp_path / "v1")


def test_weights_that_do_not_fit_are_refused_and_the_engines_serve_on(pool):
    model = sharpened(10)
    version, before = push(pool, model), pool.report().replaced
    wrong = load_model({**TINY_QWEN2, "intermediate_size": 64}, dtype="float32", seed=0)
    with pytest.raises(EngineError, match="another model"):
        push(pool, wrong)
    assert pool.report().replaced == before
    done = generate(pool, request("after"))[0]
    assert done.weights_version == version
    assert error(model, PROMPT, done) < 1e-4


def test_a_killed_engine_is_replaced_once_and_no_request_is_lost(pool):
    """Two clients notice; the new engine has the current weights, not those of a start."""
    model = sharpened(11)
    version = push(pool, model)
    before = pool.report()
    victim = before.engines[0]

    async def run():
        engines = [client(pool), client(pool)]
        calls = [
            engine.generate(request(f"{n}-{i}", key=(n, i), max_tokens=170))
            for n, engine in enumerate(engines)
            for i in range(16)
        ]
        running = asyncio.gather(*calls)
        await asyncio.sleep(0.2)
        core = core_of(victim.pid)
        os.kill(core, signal.SIGKILL)
        done = await running
        for engine in engines:
            engine.close()
        return done

    done = asyncio.run(run())
    assert len(done) == 32
    assert max(error(model, PROMPT, c) for c in done) < 1e-4
    deadline = time.monotonic() + 200
    while pool.report().serving < 2 and time.monotonic() < deadline:
        time.sleep(1)
    after = pool.report()
    assert (after.serving, after.replaced) == (2, before.replaced + 1)
    replaced = next(e for e in after.engines if e.index == victim.index)
    assert replaced.generation == victim.generation + 1
    done = generate(pool, *(request(f"t{i}", key=(i,)) for i in range(4)))
    assert {c.weights_version for c in done} == {version}
    assert max(error(model, PROMPT, c) for c in done) < 1e-4
