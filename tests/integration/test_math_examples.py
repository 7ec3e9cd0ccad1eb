"""The tuned examples on real mathematics, as they are, with a tiny model and a few local rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllib_gtpo.cli import main
from rllib_gtpo.models import TINY_QWEN2, build_tokenizer, load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

EXAMPLES = Path(__file__).parents[2] / "tuned_examples"
QUESTION = {
    "train": "Ann has 2 pens and gets {} more. How many pens?",
    "test": "Bob had 3 cups, lost {} of them, and found 5. How many cups are left?",
}
LOCAL = {
    "num_env_runners": 0,
    "num_gpus_per_env_runner": 0,
    "num_gpus_per_learner": 0,
    "evaluation_num_env_runners": 0,
    "evaluation_interval": 1,
    "groups_per_step": 2,
    "group_size": 2,
    "max_turn_tokens": 8,
    "progress": "false",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a Qwen2 of one layer and a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    settings = {**TINY_QWEN2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    settings["max_position_embeddings"] = 4096
    load_model(settings, tokenizer=tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(example: str, out: Path, **overrides):
    """The result of one iteration, as a user runs it."""
    settings = [f"--override={key}={value}" for key, value in {**LOCAL, **overrides}.items()]
    file = str(EXAMPLES / f"{example}.py")
    stop = "--stop=training_iteration=1"
    assert main(["train", "file", file, *settings, stop, "--out", str(out), "--debug"]) == 0
    (line,) = (out / "result.json").read_text().splitlines()
    return json.loads(line)


def test_gsm8k(model, tmp_path):
    data = tmp_path / "gsm8k"
    data.mkdir()
    for split, question in QUESTION.items():
        rows = [{"question": question.format(n), "answer": f"Add.\n#### {n}"} for n in range(4)]
        write(data / f"{split}.jsonl", rows)
    result = run(
        "gtpo_qwen2_5_0_5b_gsm8k",
        tmp_path / "run",
        model=model,
        evaluation_duration=3,
        **{"env_config.tasks": data},
    )
    assert result["evaluation"]["tasks"] == 3
    assert 0 <= result["evaluation"]["avg@1_low"] <= result["evaluation"]["avg@1_high"] <= 1
    assert result["group"]["kept"] == 2 and result["tokens"]["sampled"] > 0


def test_dapo(model, tmp_path, capsys):
    """Rows as the data sets have them, so that the example's `columns` are what is tested."""
    dapo = [
        {
            "prompt": [{"role": "user", "content": QUESTION["train"].format(n)}],
            "reward_model": {"ground_truth": str(n + 2)},
        }
        for n in range(4)
    ]
    tasks = {
        "train": write(tmp_path / "dapo.jsonl", dapo),
        "aime24": write(
            tmp_path / "aime.jsonl", [{"problem": QUESTION["test"].format(1), "answer": 7}]
        ),
        "math500": write(
            tmp_path / "math.jsonl", [{"problem": QUESTION["test"].format(2), "answer": "6"}]
        ),
        "svamp": write(
            tmp_path / "svamp.jsonl",
            [{"Body": f"Eve ate {n} nuts.", "Question": "Many?", "Answer": n} for n in range(3)],
        ),
    }
    call = {"function": {"name": "python", "arguments": json.dumps({"code": "print(2+1)"})}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "\\boxed{3}"},
    ]
    question = QUESTION["train"].format(1)
    trajectories = [
        {"task": {"question": question, "answer": "3"}, "messages": said},
        {"messages": [{"role": "user", "content": question}, *said]},
    ]
    result = run(
        "gtpo_qwen2_5_7b_dapo",
        tmp_path / "run",
        model=model,
        max_turns=2,
        evaluation_duration=4,
        evaluation_samples_per_task=2,
        **{
            "env_config.tasks": json.dumps(tasks),
            "cold_start.data": write(tmp_path / "trajectories.jsonl", trajectories),
            "cold_start.steps": 2,
            "cold_start.batch_size": 2,
        },
    )
    assert "cold start: 2 steps" in capsys.readouterr().out
    splits = result["evaluation"]["split"]
    assert {name: split["tasks"] for name, split in splits.items()} == {
        "aime24": 1,
        "math500": 1,
        "svamp": 2,
    }
    for split in splits.values():
        for name in ("avg@2", "maj@2", "pass@2"):
            assert 0 <= split[f"{name}_low"] <= split[name] <= split[f"{name}_high"] <= 1
    assert result["group"]["kept"] == 2 and result["tokens"]["sampled"] > 0
    assert "shaping" in result["reward"]
