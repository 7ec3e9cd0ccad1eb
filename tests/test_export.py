"""`rllib export`: the directory is complete, and its model is the policy."""

import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.cli import main
from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.export import _card, export
from rllib_gtpo.errors import ConfigError, GTPOError
from rllib_gtpo.models import build_tokenizer


@pytest.fixture(scope="module")
def trained(ray_session, tmp_path_factory):
    """A checkpoint after one update, and the learner's weights."""
    from tests.tasks import Adder

    algorithm = (
        GTPOConfig()
        .environment(Adder)
        .rollouts(max_turn_tokens=8)
        .training(lr=1e-2, group_size=2, groups_per_step=1)
        .reporting(progress=False)
        .debugging(seed=0)
        .build_algo()
    )
    algorithm.train()
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoint"
    algorithm.save_to_path(str(checkpoint))
    weights = algorithm.learner_group.get_weights()["default_policy"]
    algorithm.stop()
    return checkpoint, weights


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "adder"
    assert main(["export", str(trained[0]), str(target)]) == 0
    return target


def load(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def test_the_weights_are_those_of_the_checkpoint(trained, exported):
    state = load(exported).state_dict()
    assert {f"model.{name}" for name in state} >= set(trained[1])
    for name, value in trained[1].items():
        assert torch.equal(torch.as_tensor(value), state[name.removeprefix("model.")])


def test_it_is_complete_and_others_can_read_it(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert all(path.stat().st_mode & stat.S_IROTH for path in exported.iterdir())
    model = load(exported)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"
    messages = [{"role": "user", "content": "1+1 é"}]
    shown = [t.apply_chat_template(messages)["input_ids"] for t in (tokenizer, build_tokenizer())]
    assert shown[0] == shown[1]


def test_the_card_says_how_it_was_trained_and_its_code_runs(exported, monkeypatch, capsys):
    card = (exported / "README.md").read_text()
    assert "| group_size | 2 |" in card and "made from scratch" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(exported)
    exec(code.group(1), {})
    assert "<|im_start|>assistant" in capsys.readouterr().out


def test_of_a_run_it_is_the_last_checkpoint(trained, tmp_path):
    run = RunDirectory.create(tmp_path / "run", RunRecord("x.py", "", "x", "GTPO"))

    def write(directory):
        shutil.copytree(trained[0], directory, dirs_exist_ok=True)

    for iteration in (1, 2):
        progress = {"training_iteration": iteration, "time_total_s": 9.0, "metrics": {}}
        run.save(iteration, progress, write)
    run.record.held_out_accuracy = [0.25, 0.75]
    run.write_record()
    assert "checkpoint_000002 to" in export(run.path, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2 iterations in 9 s" in card and "0.250 before and 0.750 after" in card


def test_what_fails_midway_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("rllib_gtpo.command.export._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(trained[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_another_dtype_and_one_line_that_says_so(trained, tmp_path, capfd):
    target = tmp_path / "half"
    assert main(["export", str(trained[0]), str(target), "--dtype", "bfloat16"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("exported ") and out.count("\n") == 1
    assert "Writing model shards" not in err  # there is no terminal
    assert load(tmp_path / "half").dtype is torch.bfloat16


@pytest.fixture(scope="module")
def adapted(ray_session, tmp_path_factory):
    """A checkpoint with a LoRA adapter that matters, and the model with it."""
    from tests.tasks import Adder

    algorithm = (
        GTPOConfig()
        .environment(Adder)
        .language_model(lora={"rank": 4, "alpha": 16, "rslora": True})
        .rollouts(max_turn_tokens=8)
        .training(lr=1e-2, group_size=2, groups_per_step=1)
        .reporting(progress=False)
        .debugging(seed=0)
        .build_algo()
    )
    module = algorithm.learner_group._learner._unwrapped
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.1)
    checkpoint = tmp_path_factory.mktemp("lora") / "checkpoint"
    algorithm.save_to_path(str(checkpoint))
    algorithm.stop()
    return checkpoint, module.model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[7, 60, 5, 42, 9, 101]])).logits


@pytest.fixture(scope="module")
def merged(adapted, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "merged"
    assert main(["export", str(adapted[0]), str(target)]) == 0
    return target


def test_the_merged_model_is_the_model_with_its_adapter(adapted, merged):
    model = load(merged)
    assert not any("lora" in name for name in model.state_dict())
    assert model.dtype is torch.float32
    assert (logits(model) - logits(adapted[1])).abs().max() < 1e-5
    from rllib_gtpo.lora import adapter_off

    with adapter_off(adapted[1]):
        assert (logits(model) - logits(adapted[1])).abs().max() > 0.1
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and "| lora | {'rank': 4" in card


def test_the_adapter_alone_loads_in_peft(adapted, tmp_path):
    from peft import PeftModel

    from rllib_gtpo.models import TINY_QWEN2, load_model

    target = tmp_path / "adapter"
    assert main(["export", str(adapted[0]), str(target), "--adapter"]) == 0
    names = {path.name for path in target.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    base = load_model(TINY_QWEN2, seed=0, tokenizer=build_tokenizer())
    model = PeftModel.from_pretrained(base, target)
    assert (logits(model) - logits(adapted[1])).abs().max() < 1e-6
    assert "PeftModel.from_pretrained(base" in (target / "README.md").read_text()


def test_without_lora_there_is_no_adapter_to_export(trained, tmp_path):
    with pytest.raises(ConfigError, match="without lora"):
        export(trained[0], tmp_path / "adapter", adapter=True)


def test_pushing(trained, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    done = export(trained[0], tmp_path / "pushed", push_to="me/adder")
    assert done.endswith("and to hub/me/adder")
    assert calls[0] == ("me/adder", {"private": True, "exist_ok": True})
    assert "model.safetensors" in calls[1][1]


def test_a_failed_upload_keeps_the_directory(trained, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, name, **options):
            raise RuntimeError("401")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(GTPOError, match=r"is complete, but .* 401\. Log in .*hf upload me/adder"):
        export(trained[0], tmp_path / "kept", push_to="me/adder")
    assert load(tmp_path / "kept")


def test_a_card_tells_a_hub_id_and_no_path(trained, tmp_path):
    config = GTPOConfig().language_model(model="Qwen/Qwen2.5-0.5B-Instruct")
    assert "base_model: Qwen/Qwen2.5-0.5B-Instruct" in _card("x", trained[0], config, "hermes")
    card = _card("x", trained[0], GTPOConfig().language_model(model="/home/me/start"), "hermes")
    assert "started from start" in card and "/home" not in card and "base_model" not in card


def test_a_checkpoint_that_cannot_be_read(trained, tmp_path):
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    (broken / "rllib_checkpoint.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        export(broken, tmp_path / "x")


def test_refusals(trained, exported, tmp_path, capsys):
    for source, target, message in (
        (trained[0], exported, "exists"),
        (tmp_path / "none", tmp_path / "x", "no such directory"),
        (tmp_path, tmp_path / "x", "is not a run"),
    ):
        assert main(["export", str(source), str(target)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="float16"):
        export(trained[0], tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.part*"))


def test_an_algorithm_without_a_language_model(ray_session, tmp_path):
    from ray.rllib.algorithms.ppo import PPOConfig

    algorithm = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0).build_algo()
    algorithm.save_to_path(str(tmp_path / "ppo"))
    algorithm.stop()
    with pytest.raises(ConfigError, match="PPO, which has no language model"):
        export(tmp_path / "ppo", tmp_path / "x")
