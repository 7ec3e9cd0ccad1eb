"""The rollout bench: what it feeds the bare engine, what it records, and the docs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from release.results import renewed
from release.rollouts import bench, start
from rllib_gtpo.engines.hf import HFEngine
from rllib_gtpo.models import TINY_QWEN2, build_tokenizer, load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a "tiny" model of random weights."""
    folder = tmp_path_factory.mktemp("models")
    load_model(dict(TINY_QWEN2)).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    return folder


def test_a_widened_model_says_the_same():
    narrow = load_model(dict(TINY_QWEN2))
    size = {"hidden_size": 192, "num_hidden_layers": 3, "intermediate_size": 320}
    wide = start.widened(narrow, size)
    assert wide.config.num_attention_heads == 6
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-4)


def test_the_bare_engine_is_fed_what_was_recorded():
    asked = []

    class Watched(HFEngine):
        async def generate(self, request):
            completion = await super().generate(request)
            asked.append((request.trajectory, len(request.token_ids), len(completion.token_ids)))
            return completion

    scripts = [bench.Script([([1, 2, 3], 4), ([5, 6], 2)]), bench.Script([([7], 3)])]
    engine = Watched(load_model(dict(TINY_QWEN2)), max_context=64)
    assert asyncio.run(bench.replay(engine, scripts, 2)) == 9
    assert sorted(asked) == [("bare0", 3, 4), ("bare0", 3 + 4 + 2, 2), ("bare1", 1, 3)]
    assert engine.stats.prefill_reused == 3 + 3  # the cache of the first turn
    assert len(engine._batch._saved) == 0, "a finished trajectory was not released"


def test_the_function_does_what_the_sandbox_does():
    env = bench.InProcess({})
    for code, output in (("print(12*7)", "84\n"), ("print(3-5)", "-2\n")):
        assert asyncio.run(env.run_python(code)).output == output
    assert asyncio.run(env.run_python("print(x)")).status is not bench.Status.OK


def test_processor_time_of_children_counts():
    import subprocess
    import sys

    before = bench.processor_seconds()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert bench.processor_seconds() - before > 0.45


def test_summary_is_of_pairs():
    rollout = [bench.Timed(2.0, 3.0), bench.Timed(4.0, 3.0), bench.Timed(2.5, 3.0)]
    bare = [bench.Timed(1.0, 1.5), bench.Timed(3.0, 3.0), bench.Timed(2.0, 2.7)]
    made = bench.summary(rollout, bare, [(100, 10)] * 3)
    assert (made["ratio_min"], made["ratio"], made["ratio_max"]) == (0.5, 0.75, 0.8)
    assert made["overhead_ms"] == pytest.approx(100)
    assert made["cpu_ratio"] == pytest.approx(0.9)


def test_the_bench_runs(models, tmp_path):
    file = tmp_path / "result.json"
    options = ["--groups", "2", "--concurrency", "4", "--repetitions", "1"]
    where = ["--models", str(models), "--json", str(file)]
    bench.main([*options, *where, "--sizes", "tiny", "--tools", "function"])
    (row,) = json.loads(file.read_text())["metrics"]
    assert row["requests"] >= 2 * bench.MEMBERS
    assert row["sampled_tokens"] >= row["requests"]
    assert row["bare_tok_s"] > 0
    assert row["ratio"] == pytest.approx(row["rollout_tok_s"] / row["bare_tok_s"])


def test_the_docs_show_what_was_recorded():
    root = Path(__file__).parents[2]
    docs = (root / "docs" / "speed.md").read_text()
    recorded = json.loads((root / "release" / "results" / "rollouts.json").read_text())
    assert renewed(docs, {"rollouts": bench.table(recorded["metrics"])}) == docs
    assert recorded["passed"]
