"""What is wrong in an experiment's text is told with its line, and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.rllib.algorithms.registry import ALGORITHMS

from rllib_gtpo.cli import main
from rllib_gtpo.command.files import get_algorithm, load_experiment
from rllib_gtpo.command.search_spaces import as_yaml, make_spaces
from rllib_gtpo.command.setting_types import wrong_type
from rllib_gtpo.command.yaml_text import dump_inline, parse_yaml
from rllib_gtpo.errors import ConfigError

YAML = """\
task:
  run: GTPO
  env: rllib_gtpo_envs.Calculator
  config:
    groups_per_step: 4
"""
PPO = "task:\n  run: PPO\n  env: CartPole-v1\n  config:\n    num_epochs: 1\n"


def refusal(folder, capsys, text, *options):
    (folder / "task.yaml").write_text(text)
    assert main(["train", "file", "task.yaml", "--dry-run", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    return captured.err.removeprefix("error: ")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        # Names, at any depth.
        ("group_sise: 4", "unknown setting 'group_sise'; did you mean 'group_size'?"),
        ("cold_start: {stepz: 3}", "'stepz'; did you mean 'steps'?"),
        ("cold_start: {steps: 3, lr_: 3}", "'lr_'; did you mean 'lr'?"),
        ("lora: {rnk: 3}", "'rnk'; did you mean 'rank'?"),
        ("engine_config: {max_batchez: 3}", "'max_batchez'; did you mean 'max_batch'?"),
        ("record: {shar: 0.5}", "'shar'; did you mean 'share'?"),
        ("estimator_options: {normalise: group}", "'normalise' is unknown; did you mean 'normal"),
        ("estimator_options: {normalize: grop}", "'grop'; did you mean 'group'?"),
        ("evaluation_config: {explor: true}", "'explor'; did you mean 'explore'?"),
        ("evaluation_config: {cold_start: {stepz: 1}}", "'stepz'; did you mean 'steps'?"),
        ("optimizer: {name: Adamm}", "'Adamm' is unknown; did you mean 'Adam'?"),
        ("optimizer: {name: AdamW, eps_: 1}", "'eps_', which AdamW does not take; did you mean"),
        ("lr_schedule: {warmp: 1}", "'warmp'; did you mean 'warmup'?"),
        ("strategy_options: {offlod: true}", "'offlod' is unknown to strategy='single'"),
        ("model: {model_type: qwen2, hidden_sise: 3}", "'hidden_sise'; did you mean 'hidden_size'"),
        ("model: {model_type: qwenn}", "no such model_type; did you mean 'qwen"),
        ("estimator: gtp", "estimator='gtp' is unknown; did you mean 'gtpo'?"),
        ("call_format: hermez", "did you mean 'hermes'?"),
        # Types.
        ("lr: fast", "lr must be a number or a list, not 'fast'"),
        ("lr: .nan", "lr must be a number or a list, not nan"),
        ("max_turn_tokens: 2.5", "max_turn_tokens must be a whole number, not 2.5"),
        ("deterministic: maybe", "deterministic must be true or false, not 'maybe'"),
        ("engine_config: 7", "engine_config must be a mapping, not 7"),
        ("kl_coeff: null", "kl_coeff must be a number, not nothing"),
        ("cold_start: {lr: fast}", "cold_start.lr='fast': must be a number."),
        ("cold_start: {steps: many}", "cold_start.steps='many': at least 1."),
        ("evaluation_config: {temperature: hot}", "temperature must be a number, not 'hot'"),
        ("callbacks: nowhere.Class", "GTPOConfig refuses callbacks"),
        ("model: 5", "model=5: a directory, a hub id, or a mapping that describes a model."),
        # Values.
        ("group_size: 1", "group_size=1: a group needs at least 2"),
        ("gamma: 2", "gamma=2: must lie in [0, 1]."),
        ("num_learners: -1", "num_learners=-1: 0 or more."),
        ("record: {share: 5}", "the share of groups to record (0 to 1)"),
        ("evaluation_split: [a, a]", "the name of a split"),
        ("evaluation_duration: ten", "`evaluation_duration` (ten) must be an int"),
        ("train_batch_size: 100", "train_batch_size has no effect here"),
        # Search spaces.
        ("lr: {unifrom: [0, 1]}", "did you mean 'uniform'?"),
        ("lr: {uniform: [1, 0]}", "lower must be less than upper"),
        ("lr: {loguniform: [0, 1]}", "lower bound greater than 0"),
        ("lr: {quniform: [0, 1]}", "quniform takes [lower, upper, q]"),
        ("lr: {uniform: [0, 1, 2]}", "uniform takes [lower, upper], not [0, 1, 2]"),
        ("lr: {uniform: {lower: 0, uper: 1}}", "uniform takes [lower, upper]"),
        ("group_size: {randint: [2, 4.5]}", "upper is no whole number: 4.5"),
        ("lr: {grid_search: 3}", "grid_search takes a list of values, not 3"),
        ("lr: {choice: []}", "choice takes a list of values, not []"),
        ("group_size: {grid_search: [4, 1]}", "needs at least 2 trajectories"),
        ("cold_start: {steps: {choice: [0]}}", "cold_start.steps=0: at least 1."),
    ],
)
def test_of_gtpo(folder, capsys, setting, message):
    told = refusal(folder, capsys, f"{YAML}    {setting}\n    seed: 0\n")
    assert told.startswith("task.yaml:6: ")
    assert message in told


@pytest.mark.parametrize(
    ("setting", "line", "message"),
    [
        ("lr: fast", 6, "lr must be a number or a list, not 'fast'"),
        ("num_env_runners: two", 6, "num_env_runners must be a whole number, not 'two'"),
        ("minibatch_size: 999999", 6, "`minibatch_size` (999999) must be"),
        ("lr: {grid_search: [[1, 2], 3]}", 6, "trial lr=[1, 2]: 'int' object is not"),
        ("model_config:\n      fcnet_hidden: [8]", 7, "did you mean 'fcnet_hiddens' or"),
        ("evaluation_config:\n      gama: 1", 7, "did you mean 'gamma' or"),
        ("a: &a {b: *a}", 6, "this mapping contains itself"),
        ("lr: 1\n    lr: 2", 7, "'lr' is also set on line 6"),
    ],
)
def test_of_an_algorithm_of_rllib(folder, capsys, setting, line, message):
    told = refusal(folder, capsys, f"{PPO}    {setting}\n")
    assert told.startswith(f"task.yaml:{line}: ")
    assert message in told


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("run: GTPO", "run: 3", 2, "'task' needs `run: ALGORITHM`"),
        ("Calculator", "Calculatr", 3, "has no Calculatr; did you mean 'Calculator'"),
        ("rllib_gtpo_envs.C", "no_such_module.C", 3, "No module named 'no_such_module'"),
        ("env: rllib_gtpo_envs.Calculator", "env: 3", 3, "`env` must be a name, not 3"),
        ("  config:", "  num_samples: two\n  config:", 4, "num_samples must be a whole number"),
        ("  config:", "  checkpoint_freq: -1\n  config:", 4, "checkpoint_freq must be a whole"),
        ("  config:", "  checkpoint_minutes: soon\n  config:", 4, "checkpoint_minutes must be a"),
        ("  config:", "  stop: {accuracy: high}\n  config:", 4, "must be a number, not 'high'"),
        ("  config:", "  stop:\n    a: 1\n    b: x\n  config:", 6, "must be a number, not 'x'"),
    ],
)
def test_of_the_frame(folder, capsys, old, new, line, message):
    told = refusal(folder, capsys, YAML.replace(old, new, 1))
    assert told.startswith(f"task.yaml:{line}: ")
    assert message in told


def test_without_an_environment(folder, capsys):
    told = refusal(folder, capsys, YAML.replace("  env: rllib_gtpo_envs.Calculator\n", ""))
    assert "no environment: add `env: NAME`" in told


def test_the_option_that_is_wrong_is_named(folder, capsys):
    for option, message in [
        ("cold_start.stepz=3", "did you mean 'steps'?"),
        ("group_size=1", "needs at least 2"),
        ("lr={unifrm: [0, 1]}", "did you mean 'uniform'?"),
    ]:
        told = refusal(folder, capsys, YAML, f"--override={option}")
        assert told.startswith(f"--override {option}: ") and message in told
    told = refusal(folder, capsys, YAML, "--stop=accuracy=high")
    assert told.startswith("--stop accuracy=high: ")


def test_files_that_are_no_text(folder, capsys):
    (folder / "task.yaml").write_bytes(b"task:\n  run: \xff\xfe\n")
    assert main(["train", "file", "task.yaml"]) == 2
    assert "task.yaml: not UTF-8 text" in capsys.readouterr().err
    for text in ("", "- 1\n", "a: 1\nb: 2\n"):
        assert "one experiment {name: {run: ...}} expected" in refusal(folder, capsys, text)


def test_shared_settings_through_yaml_merge_keys(folder):
    text = "    seed: 1\n    evaluation_config:\n      <<: {explore: false}\n"
    (folder / "task.yaml").write_text(PPO + text)
    experiment = load_experiment(Path("task.yaml"))
    assert experiment.config.seed == 1
    assert experiment.config.evaluation_config == {"explore": False}
    assert experiment.places["config", "evaluation_config", "explore"] == "task.yaml:8"


@pytest.mark.parametrize(
    "space",
    [
        *({name: [1, 4]} for name in ("uniform", "loguniform", "randint", "lograndint", "randn")),
        *({f"q{name}": [1, 4, 1]} for name in ("uniform", "loguniform", "randint", "randn")),
        {"qlograndint": [1, 4, 1]},
        {"choice": [1, "a", [2]]},
        {"grid_search": [1, {"a": 2}]},
    ],
)
def test_search_spaces_are_those_of_tune(space):
    from ray.tune.search.sample import Domain
    from ray.tune.search.variant_generator import generate_variants

    made = make_spaces({"x": space})["x"]
    assert isinstance(made, Domain) or made == space
    assert as_yaml(made) == space
    assert parse_yaml(dump_inline(as_yaml(made)), "")[0] == space
    ((_, chosen), *_) = generate_variants({"x": made})
    values = [1, "a", [2], {"a": 2}]
    assert chosen["x"] in values or isinstance(chosen["x"], int | float)


def test_free_form_settings_are_free(folder, capsys):
    (folder / "task.yaml").write_text(YAML + "    env_config: {any: [thing, {goes: here}]}\n")
    config = load_experiment(folder / "task.yaml").config
    assert config.env_config == {"any": ["thing", {"goes": "here"}]}


@pytest.mark.parametrize("name", [*sorted(ALGORITHMS), "GTPO", "SFT"])
def test_no_default_is_of_a_wrong_type(name):
    """The annotations of RLlib's methods are good enough to refuse by."""
    config = get_algorithm(name).get_default_config()
    wrong = [
        reason
        for key, value in vars(config).items()
        if type(value) in (bool, int, str, list, dict)
        and (reason := wrong_type(type(config)(), key, value))
    ]
    assert wrong == []


def test_a_setting_of_another_type_than_its_default_is_refused():
    config = get_algorithm("PPO").get_default_config()
    assert wrong_type(config, "gamma", "x") == "gamma must be a number, not 'x'"
    assert wrong_type(config, "gamma", 1) is None
    assert wrong_type(config, "num_gpus_per_env_runner", 0.5) is None
    assert wrong_type(config, "num_cpus_per_env_runner", 0.5) is None
    assert wrong_type(config, "rollout_fragment_length", "auto") is None
    assert wrong_type(config, "train_batch_size_per_learner", 1e3).endswith("not 1000.0")
    with pytest.raises(ConfigError, match="unknown algorithm"):
        get_algorithm("PP")
