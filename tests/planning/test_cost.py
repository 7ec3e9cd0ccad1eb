"""The cost model's arithmetic, with numbers that a person can check."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rllib_gtpo.planning.cost import (
    ALLOCATOR,
    IterationWork,
    LearnerWork,
    ModelCost,
    RolloutWork,
    Speed,
    compute_activations,
    compute_runner,
    compute_seconds,
    compute_shares,
    learner_moments,
    worst,
)
from rllib_gtpo.planning.needs import GIB, EngineWork, Needs, fits, turns_of, workers_of
from rllib_gtpo.planning.remedies import remedies

MODEL = ModelCost(
    parameters=1000,
    trained=1000,
    largest=300,
    layer=300,
    root=400,
    head=0,
    layers=2,
    vocabulary=10,
    element=4,
    trained_element=4,
    saved_layer=100.0,
    saved_rest=10.0,
    boundary=8.0,
    kv=16.0,
)
WORK = LearnerWork(tokens=50, micro_batches=2)
ADAPTER = replace(MODEL, trained=20, largest=10, element=2)


def backward(model=MODEL, **changes):
    return learner_moments(model, replace(WORK, **changes))["backward"]


def test_adamw_in_float32_takes_sixteen_bytes_a_parameter():
    parts = backward()
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (4000, 4000, 8000)
    assert backward(optimizer=0.0)["optimizer"] == 0


def test_gradients_are_there_in_the_backward_pass_only_if_an_earlier_one_left_them():
    assert backward(micro_batches=1)["gradients"] == 0
    step = learner_moments(MODEL, replace(WORK, micro_batches=1))["step"]
    assert step["gradients"] == 4000 and step["step"] == 2 * 300 * 4


def test_activations_count_one_layer_twice():
    assert compute_activations(MODEL, WORK) == 50 * (2 * 100 + 10 + 100)
    recomputed = compute_activations(MODEL, replace(WORK, recomputes=True))
    assert recomputed == 50 * (2 * 8 + 10 + 2 * 100)


def test_master_weights_are_float32_and_so_are_gradients_and_moments():
    half = replace(MODEL, element=2, trained_element=2)
    parts = backward(half, master=True)
    names = ("parameters", "master weights", "gradients", "optimizer")
    assert [parts[name] for name in names] == [2000, 4000, 4000, 8000]
    # FSDP2's slices are the masters: 16 bytes over all learners.
    parts = backward(half, master=True, strategy="fsdp2", world=4)
    assert [parts[name] for name in names] == [1000, 0, 1000, 2000]


def test_an_adapter_needs_little_and_no_reference():
    parts = backward(ADAPTER, reference=True)
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (2000, 80, 160)
    assert parts["reference"] == 0 and parts["weights for engines"] == 80
    assert backward(reference=True)["reference"] == 4000


@pytest.mark.parametrize(
    ("strategy", "stage", "shares"),
    [
        ("single", 2, (1, 1, 1)),
        ("ddp", 2, (1, 1, 1)),
        ("fsdp2", 2, (0.25, 0.25, 0.25)),
        ("deepspeed", 1, (1, 1, 0.25)),
        ("deepspeed", 2, (1, 0.25, 0.25)),
        ("deepspeed", 3, (0.25, 0.25, 0.25)),
    ],
)
def test_what_a_strategy_slices(strategy, stage, shares):
    assert compute_shares(strategy, stage, 4) == shares


def test_buckets_and_gathered_layers():
    assert backward(strategy="ddp", world=2)["buckets"] == 4000
    assert backward(strategy="fsdp2", world=2)["gathered layers"] == 2 * (2 * 300 + 400) * 4
    assert backward(strategy="fsdp2", world=1)["gathered layers"] == 0
    assert backward(strategy="deepspeed", stage=2, world=2)["gathered layers"] == 0


def test_the_host_loses_a_part_of_what_comes_and_goes():
    parts = backward()
    comes = ("gradients", "activations", "log-prob chunk", "buckets", "gathered layers")
    assert parts["allocator"] == pytest.approx(ALLOCATOR * sum(parts[name] for name in comes))
    assert "allocator" not in backward(on_device=True)


def test_the_worst_moment_counts():
    assert worst({"a": {"x": 1.0, "y": 0.0}, "b": {"x": 0.5}}) == {"x": 1.0}


def test_a_runner_has_the_cache_of_its_rows():
    parts = compute_runner(MODEL, RolloutWork(trajectories=8, context=100))
    assert parts["KV cache"] == 8 * 100 * 16 * 1.5  # and a layer of two twice, as it grows
    few = compute_runner(MODEL, RolloutWork(trajectories=8, context=100, cache_tokens=400))
    assert few["KV cache"] == 400 * 16 * 1.5


def test_seconds_of_an_iteration():
    speed = Speed(train=0.003, step=0.1, decode=0.2, rows=11)
    work = IterationWork(
        trajectories=12, tokens=100, sampled=50, samplers=1, concurrency=6, learners=2
    )
    # 12 x 50 tokens in 6 rows: 100 steps of 0.15 s; prompts at a third of a training pass.
    seconds = compute_seconds(speed, work)
    assert seconds["rollouts"] == pytest.approx(100 * 0.15 + 12 * 50 * 0.001)
    assert seconds["update"] == pytest.approx(12 * 100 / 2 * 0.003)
    twice = compute_seconds(speed, replace(work, epochs=2, anchors=True, reference=True))
    assert twice["update"] == pytest.approx(600 * 0.003 * (2 * 4 / 3 + 1 / 3))


BIG = replace(
    MODEL,
    parameters=10**9,
    trained=10**9,
    largest=10**8,
    layer=4 * 10**8,
    root=2 * 10**8,
    saved_layer=1e6,
    boundary=1e4,
)
NEEDS = Needs(
    model=BIG,
    process=0.5 * GIB,
    learner=LearnerWork(tokens=8192, micro_batches=2, on_device=True),
    learners=1,
    rollout=RolloutWork(trajectories=8, context=1024),
    runners=1,
    eval_runners=0,
    engine=EngineWork(count=1, devices=1, share=0.4, cache=0.0, context=1024),
    iteration=IterationWork(64, 1024, 512, 1, 64, 1),
)


def test_workers_of_a_run_with_engines():
    driver, learner, runner, engine = workers_of(NEEDS, 40 * GIB)
    assert [w.name for w in (driver, learner, runner, engine)] == [
        "driver",
        "learner",
        "env runner",
        "engine",
    ]
    assert driver.device == runner.device == {} and driver.host == {"process": 0.5 * GIB}
    assert engine.device_bytes == pytest.approx(16 * GIB)  # its share, however small the model
    assert learner.device["optimizer"] == 8e9 and "optimizer" not in learner.host


def test_a_shared_device_must_hold_an_awake_engine_beside_what_the_learner_keeps():
    shared = replace(NEEDS, shared=True)
    turns = turns_of(shared, workers_of(shared, 40 * GIB))
    assert sum(turns.values()) == pytest.approx(16 * GIB + 12e9 + 0.6 * GIB)
    assert turns_of(NEEDS, workers_of(NEEDS, 40 * GIB)) == {}
    small = replace(shared, learner=replace(shared.learner, tokens=1024))
    assert fits(small, None, 40 * GIB)
    greedy = replace(small, engine=replace(small.engine, share=0.8))
    assert not fits(greedy, None, 40 * GIB)


def test_remedies_are_those_that_help():
    learner = workers_of(NEEDS, None)[1].device_bytes
    memory = 0.97 * learner
    assert not fits(NEEDS, None, memory)
    found = remedies(NEEDS, None, memory)
    assert "token_budget=4096" in found and "activation_checkpointing=True" in found
    assert not any("max_concurrency" in change for change in found)  # engines do the rollouts
    assert "lora={'rank': 8}" in remedies(NEEDS, None, 32 * GIB)
    assert remedies(NEEDS, None, 0.1 * GIB) == []
