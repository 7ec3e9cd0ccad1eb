"""The in-process engine against plain forwards, without a cache, of the same model."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rllib_gtpo.engines import model_runner
from rllib_gtpo.engines.base import Request, SamplingParams
from rllib_gtpo.engines.hf import HFEngine
from rllib_gtpo.engines.sampling import compute_stream, compute_uniforms, sample_tokens
from rllib_gtpo.errors import ConfigError, EngineError
from rllib_gtpo.types import Completion

VOCAB = 97
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    attention_dropout=0.5,  # visible at once if an engine forward ran in training mode
)


def build_model(kind: str = "qwen2", attention: str = "sdpa") -> PreTrainedModel:
    """A random model with peaked, position-dependent distributions."""
    torch.manual_seed(0)
    if kind == "gpt2":  # absolute positions, no grouped heads
        sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=VOCAB)
        model = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation=attention))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=attention))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, attn_implementation=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(7)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model()


@pytest.fixture
def engine(model: PreTrainedModel) -> HFEngine:
    return HFEngine(model, max_context=256)


def logprobs_of(
    model: PreTrainedModel, context: list[int], sampled: list[int], temperature: float = 1.0
) -> list[float]:
    """What a full forward gives to `sampled` after `context`."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        logits = model(torch.tensor([context + sampled]), use_cache=False).logits[0].float()
    model.train(was_training)
    model.config._attn_implementation = attention
    table = (logits / temperature).log_softmax(-1)
    return [float(table[len(context) - 1 + i, t]) for i, t in enumerate(sampled)]


def request(
    name: str, ids: list[int], n: int = 8, key: tuple[int, ...] = (0,), **sampling: Any
) -> Request:
    return Request(name, ids, SamplingParams(n, **sampling), key)


def run(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run(gather())


def words(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(n)]


async def converse(
    engine: HFEngine, seed: int, turns: int = 4, pause: bool = True, **sampling: Any
) -> list[tuple[list[int], Completion]]:
    """One trajectory of ragged turns; each item is a turn's context and completion."""
    rng = random.Random(seed)
    ids, turns_made = words(seed, rng.randint(1, 40)), []
    for turn in range(turns):
        completion = await engine.generate(
            request(f"t{seed}", ids, rng.randint(1, 12), (seed, turn), **sampling)
        )
        turns_made.append((ids, completion))
        ids = ids + completion.token_ids + words(100 * seed + turn, rng.randint(0, 15))
        if pause:
            for _ in range(rng.randrange(6)):  # a tool takes some steps of the engine
                await asyncio.sleep(0)
    return turns_made


def assert_exact(
    model: PreTrainedModel, turns: list[tuple[list[int], Completion]], temperature: float = 1.0
) -> None:
    for ids, completion in turns:
        expected = logprobs_of(model, ids, completion.token_ids, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("qwen2", "sdpa"),
        ("qwen2", "eager"),
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
    ],
)
def test_logprobs_equal_a_full_forward(kind: str, attention: str) -> None:
    model = build_model(kind, attention)
    engine = HFEngine(model, max_context=256, max_batch=6)
    for turns in run(*(converse(engine, seed) for seed in range(12))):
        assert_exact(model, turns)
    assert engine.stats.mean_batch > 3, "the conversations did not share forwards"


def test_a_step_is_one_forward(model: PreTrainedModel, engine: HFEngine) -> None:
    """Those that go on and those that come back, with few tokens or many, in whatever order."""
    contexts = [(f"p{n}", words(n, n)) for n in (1, 150, 7, 80)]
    calls = [engine.generate(request(name, ids, 30)) for name, ids in contexts]
    turns, completions = [], run(*(converse(engine, seed) for seed in range(12)), *calls)
    turns += [turn for made in completions[:12] for turn in made]
    turns += [(ids, made) for (_, ids), made in zip(contexts, completions[12:], strict=True)]
    assert_exact(model, turns)
    assert engine.stats.forwards == engine.stats.steps < sum(len(c.token_ids) for _, c in turns) / 4
    prefilled = sum(len(ids) for _, ids in contexts)
    assert engine.stats.prefill_computed > prefilled


class Deaf(Qwen2ForCausalLM):
    """Hands nothing on to its attention but what it knows."""

    def forward(self, reaches: Any = None, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


def test_a_model_that_cannot_be_packed_is_padded(model: PreTrainedModel) -> None:
    deaf = Deaf(model.config)
    deaf.load_state_dict(model.state_dict())
    engine = HFEngine(deaf, max_context=256, prefill_tokens=128)
    assert not engine._batch._runner.packs and HFEngine(model, max_context=256)._batch._runner.packs
    for turns in run(*(converse(engine, seed) for seed in range(12))):
        assert_exact(model, turns)
    assert engine.stats.forwards > engine.stats.steps


def test_logprobs_are_those_of_the_temperature_and_precede_top_p(
    model: PreTrainedModel, engine: HFEngine
) -> None:
    for turns in run(*(converse(engine, s, temperature=2.5, top_p=0.7) for s in range(6))):
        assert_exact(model, turns, temperature=2.5)


def test_long_prompts_are_prefilled_in_parts(model: PreTrainedModel) -> None:
    engine = HFEngine(model, max_context=256, prefill_tokens=16)
    contexts = [words(s, n) for s, n in enumerate((1, 15, 16, 17, 33, 100, 101))]
    completions = run(
        *(engine.generate(request(f"p{i}", ids, 5, (i,))) for i, ids in enumerate(contexts))
    )
    assert_exact(model, list(zip(contexts, completions, strict=True)))


def test_equal_prompts_are_computed_once(model: PreTrainedModel, engine: HFEngine) -> None:
    prompts = [words(3, 30), words(4, 20)] * 4
    completions = run(
        *(engine.generate(request(f"m{i}", ids, 9, (i,))) for i, ids in enumerate(prompts))
    )
    assert_exact(model, list(zip(prompts, completions, strict=True)))
    assert len({tuple(c.token_ids) for c in completions[::2]}) > 1, "members sampled alike"
    assert engine.stats.prefill_computed == 30 + 20
    assert engine.stats.prefill_reused == 3 * (30 + 20)


def test_a_key_gives_the_same_tokens_alone_and_in_any_batch(model: PreTrainedModel) -> None:
    alone = []
    for seed in range(10):
        alone += run(converse(HFEngine(model, max_context=256), seed))
    together = run(*(converse(HFEngine(model, max_context=256), seed) for seed in range(10)))
    crowded = HFEngine(model, max_context=256, max_batch=3)
    shuffled = run(*(converse(crowded, seed) for seed in reversed(range(10))))[::-1]
    ids = [[c.token_ids for _, c in turns] for turns in alone]
    assert [[c.token_ids for _, c in turns] for turns in together] == ids
    assert [[c.token_ids for _, c in turns] for turns in shuffled] == ids


def test_keys_differ(engine: HFEngine) -> None:
    keys = [(1,), (2,), (1, 0), (0, 1), (-1,), (2**64 + 1,), ()]
    made = run(*(engine.generate(request(str(k), [5, 6], 40, k, temperature=5.0)) for k in keys))
    assert len({tuple(c.token_ids) for c in made}) == len(keys)


def test_lock_step_runs_repeat_bit_for_bit(model: PreTrainedModel) -> None:
    def once() -> list[Any]:
        engine = HFEngine(model, max_context=256)
        made = run(*(converse(engine, seed, pause=False) for seed in range(16)))
        return [[(c.token_ids, c.logprobs) for _, c in turns] for turns in made]

    assert once() == once()


def test_sampled_frequencies_match_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0, -torch.inf, 0.5, -3.0])
    n, expected = 40_000, (logits / 1.5).softmax(-1)
    uniforms = compute_uniforms(
        [compute_stream((7, i)) for i in range(n)], [i % 5 for i in range(n)]
    )
    tokens, logprobs = sample_tokens(logits.expand(n, -1), [1.5] * n, [1.0] * n, uniforms)
    counts = torch.bincount(torch.tensor(tokens), minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi2 = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum()
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001
    assert logprobs[0] == pytest.approx(float(expected[tokens[0]].log()), abs=1e-5)


def test_uniforms_are_uniform_along_positions_and_keys() -> None:
    one_key = compute_uniforms([compute_stream((3, 1))] * 20_000, list(range(20_000)))
    one_position = compute_uniforms([compute_stream((0, i)) for i in range(20_000)], [9] * 20_000)
    for uniforms in (one_key, one_position):
        assert uniforms.min() >= 0 and uniforms.max() < 1
        counts = torch.histc(uniforms, 20, 0, 1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, p = 0.001
        assert abs(torch.corrcoef(torch.stack([uniforms[1:], uniforms[:-1]]))[0, 1]) < 0.03


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-48])
def test_impossible_tokens_are_never_returned(u: float) -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 3.0, -inf, -inf], [-inf, -inf, 1.0, -200.0], [0.0, 0, 0, -inf]])
    uniforms = torch.full((3,), u, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, [1.0] * 3, [1.0] * 3, uniforms)
    assert tokens == [1, 2, int(3 * u)]
    assert all(torch.isfinite(torch.tensor(logprobs)))


def test_top_p_never_leaves_the_nucleus() -> None:
    logits = torch.tensor([0.4, 0.05, 0.3, 0.05, 0.2]).log()
    n = 5000
    uniforms = compute_uniforms([compute_stream((i,)) for i in range(n)], [0] * n)

    def tokens(top_p: float) -> Counter[int]:
        return Counter(sample_tokens(logits.expand(n, -1), [1.0] * n, [top_p] * n, uniforms)[0])

    assert set(tokens(0.39)) == {0}
    assert set(tokens(0.69)) == {0, 2}
    assert set(tokens(0.71)) == {0, 2, 4}
    assert set(tokens(0.96)) == {0, 1, 2, 3, 4}
    assert tokens(0.69)[0] / n == pytest.approx(4 / 7, abs=0.03)
    mixed, _ = sample_tokens(logits.expand(n, -1), [1.0] * n, [0.39, 1.0] * (n // 2), uniforms)
    assert set(mixed[::2]) == {0} and set(mixed[1::2]) == {0, 1, 2, 3, 4}


def test_logits_that_are_not_finite_are_refused() -> None:
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        with pytest.raises(FloatingPointError):
            sample_tokens(logits, [1.0] * 2, [1.0] * 2, torch.zeros(2, dtype=torch.float64))


def test_greedy_equals_generate(model: PreTrainedModel, engine: HFEngine) -> None:
    contexts = [words(s, 3 + 5 * s) for s in range(5)]
    model.eval()
    expected = [
        model.generate(
            torch.tensor([ids]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in contexts
    ]
    sampled = engine.generate(request("hot", [1, 2], 20, temperature=3.0))
    made = run(
        *(engine.generate(request(f"g{i}", c, 20, temperature=0)) for i, c in enumerate(contexts)),
        sampled,
    )[:-1]
    assert [c.token_ids for c in made] == expected
    assert_exact(model, list(zip(contexts, made, strict=True)))


def watch_rows(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows that each forward to come gives logits for."""
    rows: list[int] = []
    forward = engine._batch._runner.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            rows.append(len(kwargs["logits_to_keep"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._batch._runner.model, "forward", counted)
    return rows


def test_finished_rows_leave_and_new_ones_enter(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = watch_rows(engine, monkeypatch)
    run(*(engine.generate(request(f"r{n}", [n, 7], n, (n,))) for n in (1, 2, 4)))
    assert rows == [3, 2, 1, 1]

    async def later() -> None:
        first = asyncio.create_task(engine.generate(request("a", [1, 2, 3], 5)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(first, engine.generate(request("b", [4], 2)))

    rows.clear()
    asyncio.run(later())
    assert rows == [1, 1, 2, 2, 1]  # a twice; both twice; a


@pytest.mark.parametrize("ends", [False, True])
def test_a_quick_tool_misses_no_step(engine: HFEngine, ends: bool) -> None:
    """A trajectory that comes back within a few turns of the loop is in the very next step."""

    async def quick() -> None:
        for turn in range(3):
            await engine.generate(request("quick", words(turn, 10 + turn), 3, (turn,)))
            for _ in range(8):
                await asyncio.sleep(0)

    async def ending() -> None:
        await engine.generate(request("ending", words(7, 9), 3))
        if ends:
            engine.release("ending")

    run(quick(), ending(), engine.generate(request("long", words(8, 12), 9)))
    assert engine.stats.steps == 9


@pytest.fixture
def slow_steps(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> HFEngine:
    """An engine whose steps take 0.2 s."""
    step = engine._batch.step

    def slow() -> None:
        time.sleep(0.2)
        step()

    monkeypatch.setattr(engine._batch, "step", slow)
    return engine


def test_a_tool_that_takes_little_of_a_step_misses_none(slow_steps: HFEngine) -> None:
    """A trajectory that comes back within a few milliseconds is in the very next step."""

    async def quick() -> None:
        for turn in range(3):
            await slow_steps.generate(request("quick", words(turn, 10 + turn), 1, (turn,)))
            await asyncio.sleep(0.005)

    run(quick(), slow_steps.generate(request("long", words(8, 12), 3)))
    assert slow_steps.stats.steps == 3


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the engine was ready to wait, each time that it did."""
    waits = []
    wait_for = asyncio.wait_for

    async def counted(future: Coroutine[Any, Any, Any], timeout: float) -> Any:
        waits.append(timeout)
        return await wait_for(future, timeout)

    monkeypatch.setattr(asyncio, "wait_for", counted)
    return waits


def test_a_slow_tool_holds_up_nobody(slow_steps: HFEngine, waits: list[float]) -> None:
    """A trajectory that stays away is waited for once, for a part of a step."""
    run(
        slow_steps.generate(request("gone", words(1, 5), 1)),
        slow_steps.generate(request("stays", words(2, 5), 5)),
    )
    assert slow_steps.stats.steps == 5
    assert len(waits) == 1 and waits[0] >= 0.15 * 0.2


def test_nobody_is_waited_for_while_others_fill_the_step(
    model: PreTrainedModel, waits: list[float]
) -> None:
    engine = HFEngine(model, max_context=256, max_batch=2)
    run(
        engine.generate(request("gone", words(1, 5), 1)),
        engine.generate(request("stays", words(2, 5), 6)),
        engine.generate(request("queued", words(3, 5), 5)),
    )
    assert engine.stats.steps == 6
    assert waits == []


def test_turns_reuse_the_cache(model: PreTrainedModel, engine: HFEngine) -> None:
    first, second = words(1, 20), words(2, 6)

    async def two_turns() -> list[tuple[list[int], Completion]]:
        a = await engine.generate(request("t", first, 10))
        ids = first + a.token_ids + second
        return [(first, a), (ids, await engine.generate(request("t", ids, 10, (1,))))]

    assert_exact(model, asyncio.run(two_turns()))
    stats = engine.reset_stats()
    assert stats.prefill_computed == 20 + 1 + 6  # the last sampled token was not computed yet
    assert stats.prefill_reused == 20 + 9
    assert (stats.tokens, stats.steps) == (20, 20)
    assert engine.stats.tokens == 0


def test_a_changed_context_keeps_the_common_prefix(
    model: PreTrainedModel, engine: HFEngine
) -> None:
    ids = words(1, 20)
    other = [*ids[:12], (ids[12] + 1) % VOCAB, *ids[13:18]]
    for context, reused in ((ids, 0), (other, 12), (other[:5], 4), (words(9, 8), 0)):
        engine.reset_stats()
        completion = run(engine.generate(request("t", context, 6)))
        assert_exact(model, [(context, completion[0])])
        assert engine.stats.prefill_reused == reused


def test_release_forgets(model: PreTrainedModel, engine: HFEngine) -> None:
    async def scenario() -> None:
        call = asyncio.create_task(engine.generate(request("t", [1, 2, 3], 4)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.release("t")  # still running: it completes, and leaves nothing behind
        assert len((await call).token_ids) == 4
        await engine.generate(request("u", [1, 2, 3], 4))
        engine.release("u")
        engine.release("unknown")

    asyncio.run(scenario())
    assert engine._batch._saved.tokens == 0 and len(engine._batch._saved) == 0


def test_eviction_is_bounded_and_exact(model: PreTrainedModel) -> None:
    engine = HFEngine(model, max_context=128, cache_tokens=300)
    batch = engine._batch
    most = []
    step = batch.step

    def watched() -> None:
        step()
        limit = max((c.limit for c in batch._active), default=0)
        cache = batch._cache
        most.append((batch._saved.tokens + len(batch._active) * limit, cache.rows * cache.columns))

    batch.step = watched  # type: ignore[method-assign]
    for turns in run(*(converse(engine, seed, turns=3) for seed in range(12))):
        assert_exact(model, turns)
    assert engine.stats.evictions > 0
    assert max(m[0] for m in most) <= 300 and max(m[1] for m in most) <= 300


def test_eviction_takes_the_oldest(model: PreTrainedModel) -> None:
    engine = HFEngine(model, max_context=64, cache_tokens=64)
    for name, ids in (("old", words(1, 20)), ("new", words(2, 20)), ("third", words(3, 30))):
        run(engine.generate(request(name, ids, 2)))
    assert list(engine._batch._saved._saved) == ["new", "third"]


def test_new_weights_drop_caches_and_stamp() -> None:
    model = build_model()
    engine = HFEngine(model, max_context=256)
    ids = words(1, 20)

    async def scenario() -> None:
        before = await engine.generate(request("t", ids, 6))
        assert (before.weights_version, before.last_version) == (0, None)
        assert_exact(model, [(ids, before)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine.weights_updated(3)
        longer = ids + before.token_ids
        after = await engine.generate(request("t", longer, 6))
        assert (after.weights_version, after.last_version) == (3, None)
        assert_exact(model, [(longer, after)])

    asyncio.run(scenario())


def test_weights_that_change_during_a_completion() -> None:
    model = build_model()
    engine = HFEngine(model, max_context=256)
    contexts = [words(s, 10 + s) for s in range(3)]

    async def scenario() -> list[Completion]:
        calls = [
            asyncio.create_task(engine.generate(request(f"w{i}", ids, 10, (i,))))
            for i, ids in enumerate(contexts)
        ]
        for _ in range(5):
            await asyncio.sleep(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        engine.weights_updated(1)
        return await asyncio.gather(*calls)

    old = build_model()
    for ids, completion in zip(contexts, asyncio.run(scenario()), strict=True):
        first = logprobs_of(old, ids, completion.token_ids)
        second = logprobs_of(model, ids, completion.token_ids)
        switch = next(i for i in range(10) if abs(completion.logprobs[i] - first[i]) > 1e-4)
        assert switch == 4
        assert completion.last_version == 1
        assert completion.logprobs == pytest.approx(first[:4] + second[4:], abs=1e-4)
        assert completion.weights_version == 0


def test_a_cancelled_call_leaves_the_batch(
    model: PreTrainedModel, engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = watch_rows(engine, monkeypatch)
    contexts = [words(s, 12) for s in range(3)]

    async def scenario() -> tuple[list[tuple[list[int], Completion]], Completion]:
        calls = [
            asyncio.create_task(engine.generate(request(f"c{i}", ids, 8, (i,))))
            for i, ids in enumerate(contexts)
        ]
        for _ in range(4):
            await asyncio.sleep(0)
        calls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        again = await engine.generate(request("c0", contexts[0], 8, (0,)))
        rest = [(contexts[i], await calls[i]) for i in (1, 2)]
        return rest, again

    rest, again = asyncio.run(scenario())
    assert_exact(model, [*rest, (contexts[0], again)])
    assert rows[:3] == [3, 3, 3] and 2 in rows
    assert not engine._batch.calls


def test_a_failed_forward_fails_pending_calls_only(
    model: PreTrainedModel, engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = words(1, 12)
    first = run(engine.generate(request("before", ids, 5)))[0]
    cause = RuntimeError("out of memory")

    async def scenario() -> list[Any]:
        calls = [engine.generate(request(f"f{i}", ids, 8, (i,))) for i in range(3)]
        tasks = [asyncio.create_task(c) for c in calls]
        for _ in range(3):
            await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(cause))
            return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(scenario()):
        assert isinstance(error, EngineError) and error.__cause__ is cause
        assert "out of memory" in str(error)
    again, other = run(
        engine.generate(request("before", ids, 5)), engine.generate(request("f0", ids, 5, (9,)))
    )
    assert again.token_ids == first.token_ids
    assert_exact(model, [(ids, again), (ids, other)])


def test_stop_and_length(model: PreTrainedModel) -> None:
    engine = HFEngine(model, max_context=30)
    ids = words(1, 10)
    free = run(engine.generate(request("free", ids, 15)))[0]
    assert (free.finish, len(free.token_ids)) == ("length", 15)
    stop = free.token_ids[6]
    at = free.token_ids.index(stop)
    stopped = run(engine.generate(request("stop", ids, 15, stop_token_ids=(stop, VOCAB + 5))))[0]
    assert stopped.finish == "stop" and stopped.token_ids == free.token_ids[: at + 1]
    full = run(engine.generate(request("full", ids, 1000)))[0]
    assert full.finish == "length" and len(full.token_ids) == 20
    assert full.token_ids[:15] == free.token_ids


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        (request("x", []), "at least one token"),
        (request("x", [1] * 256), "raise max_context"),
        (request("x", [1], 0), "at least one token"),
        (request("x", [1], temperature=-1.0), "temperature"),
        (request("x", [1], temperature=float("nan")), "temperature"),
        (request("x", [1], top_p=0.0), "top_p"),
        (request("x", [1, VOCAB]), "vocabulary"),
        (request("x", [-1]), "vocabulary"),
    ],
)
def test_bad_requests_are_refused_alone(engine: HFEngine, bad: Request, remedy: str) -> None:
    async def scenario() -> tuple[Any, ...]:
        good = engine.generate(request("good", [1, 2], 3))
        return await asyncio.gather(good, engine.generate(bad), return_exceptions=True)

    good, error = asyncio.run(scenario())
    assert len(good.token_ids) == 3
    assert isinstance(error, ValueError) and remedy in str(error)


def test_two_calls_of_one_trajectory_are_refused(engine: HFEngine) -> None:
    async def scenario() -> list[Any]:
        calls = (engine.generate(request("t", [1, 2], 3)) for _ in range(2))
        return await asyncio.gather(*calls, return_exceptions=True)

    good, error = asyncio.run(scenario())
    assert len(good.token_ids) == 3
    assert isinstance(error, EngineError) and "name of its own" in str(error)


def test_close_fails_pending_calls(engine: HFEngine) -> None:
    async def scenario() -> list[Any]:
        calls = [asyncio.create_task(engine.generate(request(str(i), [i], 50))) for i in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.close()
        engine.close()
        return await asyncio.gather(
            *calls, engine.generate(request("late", [1])), return_exceptions=True
        )

    for error in asyncio.run(scenario()):
        assert isinstance(error, EngineError) and "closed" in str(error)


def test_a_loop_that_died_with_calls_pending_does_no_harm(engine: HFEngine) -> None:
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(engine.generate(request("t", [1, 2], 100)))
    for _ in range(3):
        loop.run_until_complete(asyncio.sleep(0))
    assert not abandoned.done()
    loop.stop()
    completion = run(engine.generate(request("t", [1, 2], 3)))[0]
    assert len(completion.token_ids) == 3
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(abandoned)
    loop.close()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = build_model()
    model.train(training)
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    ids = words(1, 10)
    completion = run(HFEngine(model, max_context=64).generate(request("t", ids, 5)))[0]
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert_exact(model, [(ids, completion)])
    model(torch.tensor([ids]), use_cache=False).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(("limit", "used"), [(10**9, 1), (0, 2)])
def test_small_steps_have_one_thread(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, limit: int, used: int
) -> None:
    monkeypatch.setattr(model_runner, "ONE_THREAD", limit)
    threads = []
    hook = model.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(HFEngine(model, max_context=64).generate(request("t", words(1, 10), 3)))
        assert set(threads) == {used} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        hook.remove()


def test_models_it_would_get_wrong_are_refused(model: PreTrainedModel) -> None:
    window = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=32))
    HFEngine(window, max_context=32)
    with pytest.raises(ConfigError, match="max_context <= 32"):
        HFEngine(window, max_context=64)
    mixed = Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    )
    with pytest.raises(ConfigError, match="max_context <= 16"):
        HFEngine(mixed, max_context=64)
    with pytest.raises(ConfigError, match="lower it"):
        HFEngine(model, max_context=513)
    with pytest.raises(ConfigError, match="raise it"):
        HFEngine(model, max_context=256, cache_tokens=255)
