"""The probe against whole models, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.cli import main
from rllib_gtpo.models import TINY_QWEN2, load_model
from rllib_gtpo.planning.probe import _batch, _module, _saved_bytes, measure, optimizer_ratio
from tests.tasks import Adder

ROOT = Path(__file__).parents[2]
MODEL = {**TINY_QWEN2, "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 20_000}


def config(**model):
    return GTPOConfig().environment(Adder).language_model(model={**MODEL, **model})


@pytest.mark.parametrize("tied", [True, False])
def test_two_layers_and_a_part_of_the_vocabulary_tell_of_the_whole_model(tied):
    made = config(tie_word_embeddings=tied)
    found = measure(made, 4, 1, 1).model
    whole = load_model(made.language_model_source)
    assert found.parameters == found.trained == sum(p.numel() for p in whole.parameters())
    assert found.largest == found.head == 20_000 * 64
    assert found.kv == 2 * 4 * 2 * 16 * 4
    module = _module(made, made.language_model_source)
    batch = _batch(module, found.parameters, module.pack())
    saved = _saved_bytes(module, batch) / batch.num_tokens
    assert found.saved_rest - found.boundary + 4 * found.saved_layer == pytest.approx(
        saved, rel=0.02
    )


def test_what_autograd_keeps_is_what_a_person_counts():
    """A layer of Qwen2 in float32: of width H, with an inner one of I."""
    found = measure(config(), 4, 1, 1).model
    floats = found.saved_layer / 4
    width, inner, kv = 64, 256, 32
    norms = 2 * (2 * width + width)  # input, normalised, and what comes out of each
    attention = width + 2 * kv + 2 * width  # queries, keys, values; its output, and its copy
    mlp = 4 * inner  # gate, its activation, up, their product
    assert floats == pytest.approx(norms + attention + mlp, rel=0.1)


@pytest.mark.parametrize(
    ("optimizer", "ratio"),
    [
        ({"name": "AdamW"}, 2.0),
        ({"name": "SGD"}, 0.0),
        ({"name": "SGD", "momentum": 0.9}, 1.0),
        ({"name": "Adafactor"}, 2 / 256),
    ],
    ids=str,
)
def test_any_optimizer_is_asked_for_its_state(optimizer, ratio):
    made = config().training(optimizer=optimizer)
    assert optimizer_ratio(made) == pytest.approx(ratio, rel=0.1)


FILE = """
from rllib_gtpo import GTPOConfig
from tests.tasks import Adder

config = (
    GTPOConfig()
    .environment(Adder)
    .language_model(model=%r)
    .rollouts(max_tokens=256, max_turn_tokens=64)
    .training(group_size=4, groups_per_step=64, token_budget=65_536)
)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "run.py"
    path.write_text(FILE % MODEL)
    return str(path)


class TestCommand:
    def test_a_run_that_fits_and_one_that_does_not(self, file, capsys):
        assert main(["plan", file, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["fits"] and said["train_tokens_per_s"] > 0
        (driver,) = said["workers"]
        assert said["host_bytes"] == pytest.approx(sum(driver["host"].values()))
        assert said["iteration"]["trajectories"] == 256

        tight = 0.9 * said["host_bytes"] / 2**30
        assert main(["plan", file, "--memory", f"{tight:.3f}"]) == 2
        shown = capsys.readouterr().out
        assert "does not fit: there are" in shown and "Any of these would do" in shown
        (budget,) = [w for w in shown.split() if w.startswith("token_budget=")]
        assert main(["plan", file, "--memory", f"{tight:.3f}", "--override", budget]) == 0
        shown = capsys.readouterr().out
        for word in ("activations", "rollout KV cache", "optimizer", "tokens/s", "an iteration"):
            assert word in shown

    def test_what_it_cannot_plan(self, tmp_path, capsys):
        assert main(["plan", str(ROOT / "tuned_examples" / "ppo_cartpole.yaml")]) == 2
        assert "rllib plan is for GTPO, GRPO and SFT" in capsys.readouterr().err
        assert main(["plan", str(tmp_path / "none.py")]) == 2
        with pytest.raises(SystemExit) as stop:
            main(["plan", "x.py", "--memory", "0"])
        assert stop.value.code == 2 and "not above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plan_is_near_what_a_run_takes(tmp_path):
    """The smallest size of release/learner/plan_accuracy.py; three larger ones are recorded."""
    script = ROOT / "release" / "learner" / "plan_accuracy.py"
    done = subprocess.run(
        [sys.executable, str(script), "--sizes", "tiny", "--json", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "plan.json").read_text())["metrics"]
    assert {row["worker"] for row in rows} == {"learner", "env runner"}
    assert all(row["error"] <= 0.25 for row in rows)
