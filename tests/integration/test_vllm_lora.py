"""LoRA over a vLLM engine: the adapter reaches it, and what is exported runs in it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import ray
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.cli import main
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import TINY_QWEN2
from rllib_gtpo_envs import Calculator

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PROMPTS = [[5 + (i * k) % 200 for i in range(20)] for k in (7, 11, 13, 17)]
NEW_TOKENS = 24
VLLM_GREEDY = """
import json, sys
from vllm import LLM, SamplingParams

directory, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(directory, dtype="float32", enforce_eager=True, max_model_len=256,
          kv_cache_memory_bytes=64 << 20, block_size=32)
sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def config(lora):
    return (
        GTPOConfig()
        .environment(Calculator)
        .language_model(
            model={**TINY_QWEN2, "num_hidden_layers": 3},
            call_format="fenced",
            lora=lora,
            cold_start={"data": "expert", "steps": 30, "batch_size": 16, "lr": 1e-2},
        )
        .training(lr=1e-2, group_size=4, groups_per_step=2)
        .rollouts(max_turn_tokens=24, max_tokens=256)
        .reporting(progress=False)
        .debugging(seed=1)
    )


def policy(algorithm):
    return algorithm.learner_group._learner._unwrapped.model


def greedy(model):
    """By the logits alone: no generation code of anybody."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory):
    """Two iterations with one engine, a checkpoint, and what its policy says when it is greedy."""
    settings = config({"rank": 4, "alpha": 16}).rollouts(engine="vllm", num_engines=1)
    algorithm = settings.env_runners(num_env_runners=1).build_algo()
    yield algorithm
    algorithm.stop()


def test_the_engine_samples_with_the_adapter_that_was_learned(run):
    for iteration in range(2):
        result = run.train()
        # The sampler's log-probabilities are the learner's: base and adapter are in sync.
        assert abs(result["mismatch"]["kl"]) < 1e-6, iteration
        assert set(result["weights"].values()) == {0.0}  # neither stale nor spanning
        state = run.learner_group.get_weights()["default_policy"]
        assert result["sync"]["bytes"] == sum(v.nbytes for v in state.values())
    assert max(v.abs().max() for k, v in state.items() if "lora_B" in k) > 1e-2
    versions = run.learner_group.foreach_learner(lambda learner: learner._weights_seq_no)
    assert run.engines.report().version == versions.result_or_errors[0].get()


def test_a_replaced_engine_has_the_newest_adapter(run):
    before = run.engines.report()
    ray.kill(before.engines[0].actor)
    deadline = time.monotonic() + 300
    while run.engines.report().replaced == before.replaced and time.monotonic() < deadline:
        time.sleep(1)
    assert abs(run.train()["mismatch"]["kl"]) < 1e-6
    assert run.engines.report().replaced == before.replaced + 1


def test_a_restored_run_samples_with_the_restored_adapter(run, tmp_path):
    run.save_to_path(str(tmp_path / "checkpoint"))
    run.train()
    run.restore_from_path(str(tmp_path / "checkpoint"))
    assert abs(run.train()["mismatch"]["kl"]) < 1e-6


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 16}], ids=["whole", "merged"])
def test_what_is_exported_says_the_same_everywhere(ray_session, tmp_path, lora):
    """The trained module, plain transformers, and plain vLLM in a process of its own."""
    from transformers import AutoModelForCausalLM

    algorithm = config(lora).build_algo()
    algorithm.train()
    algorithm.save_to_path(str(tmp_path / "checkpoint"))
    trained = greedy(policy(algorithm))
    algorithm.stop()
    directory = tmp_path / "exported"
    assert main(["export", str(tmp_path / "checkpoint"), str(directory)]) == 0
    assert len({tuple(tokens) for tokens in trained}) > 1
    assert greedy(AutoModelForCausalLM.from_pretrained(directory)) == trained
    done = subprocess.run(
        [
            *(sys.executable, "-c", VLLM_GREEDY, str(directory)),
            *(json.dumps(PROMPTS), str(NEW_TOKENS)),
        ],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-2000:]
    assert json.loads(lines[0].removeprefix("TOKENS ")) == trained


@pytest.mark.parametrize(
    ("lora", "engine_config", "message"),
    [
        ({}, {"enable_lora": True}, "decides it"),
        ({}, {"max_lora_rank": 8}, "decides it"),
        ({"rank": 600}, {}, "at most 512"),
    ],
)
def test_engine_settings_that_lora_decides_are_refused(lora, engine_config, message):
    made = config(lora).rollouts(engine="vllm", engine_config=engine_config)
    with pytest.raises(ConfigError, match=message):
        made.validate()
