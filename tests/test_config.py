import pytest

from rllib_gtpo import GRPOConfig, GTPOConfig, SFTConfig
from rllib_gtpo.errors import ConfigError
from tests.tasks import Adder


def valid(config):
    config.environment(Adder).validate()
    return config


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"group_size": 1}, "at least 2 trajectories"),
            ({"estimator": "gppo"}, "valid: gtpo"),
            ({"estimator": "grpo_sun"}, "did you mean 'grpo_sum'"),
            ({"estimator_options": {"normalise": "group"}}, "did you mean 'normalize'"),
            ({"estimator_options": {"normalize": "groups"}}, "did you mean 'group'"),
            ({"estimator": "grpo", "estimator_options": {"normalize": "group"}}, "not used"),
            ({"estimator_options": {"gamma": 0.5}}, r"training\(gamma=...\)"),
            ({"estimator": "grpo", "gamma": 0.5}, "no effect"),
            ({"gamma": 1.5}, "must lie in"),
            ({"gamma": "0.9"}, "gamma='0.9': must be a number"),
            ({"gamma": float("nan")}, "must be a number"),
            ({"uniform_groups": "drop_all"}, "keep, drop_solved, drop"),
            ({"mini_batches": 17}, "some would be empty"),
            ({"aggregation": "constant"}, "constant"),
            ({"clip_low": 2.0}, "clip_low"),
            ({"ratio_level": "word"}, "did you mean"),
            ({"groups_per_step": 0}, "at least 1"),
            ({"optimizer": {"name": "AdamW", "lr": 1.0}}, r"training\(lr=...\)"),
            ({"importance_cap": 3.0}, "no effect unless importance_sampling"),
            ({"kl_estimator": "k1"}, "no effect unless kl_coeff"),
            ({"num_epochs": 3}, "no effect here; use group_size"),
            ({"grad_clip_by": "value"}, "global norm"),
            ({"optimizer": {"name": "AdanW"}}, "did you mean 'Adam"),
            ({"resample_groups": 4}, "no effect with uniform_groups='keep'"),
            ({"resample_groups": -1}, "at least 0"),
            ({"resample_groups": 0.5, "uniform_groups": "drop"}, "whole number"),
            ({"overlong": "masked"}, "did you mean 'mask'"),
            ({"overlong": "mask", "overlong_penalty": 0.5}, "unless overlong='penalty'"),
            ({"overlong_buffer": 10}, "unless overlong='penalty'"),
            ({"overlong": "penalty"}, r"no effect without rollouts\(max_tokens"),
        ],
    )
    def test_training(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            valid(GTPOConfig().training(**settings))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": 0.0}, "above 0"),
            ({"top_p": 0.0}, "top_p"),
            ({"temperature": True}, "must be a number"),
            ({"engine": "vlm"}, "valid: hf"),
            ({"max_turns": 0}, "max_turns"),
            ({"max_concurrency": 0}, "max_concurrency=0: must be a whole number of at least 1"),
            ({"stragglers": "drip"}, "did you mean 'drop'"),
            ({"stragglers": "drop"}, "more must be rolled out than are needed"),
            ({"oversample": 0.5}, "to wait for all, leave both out"),
            ({"stragglers": "drop", "oversample": -0.5}, "more must be rolled out"),
            ({"max_turn_tokens": 100, "max_tokens": 50}, "one turn cannot be longer"),
        ],
    )
    def test_rollouts(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            valid(GTPOConfig().rollouts(**settings))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "float8"}, "float32, bfloat16"),
            ({"call_format": "xml"}, "valid: .*hermes"),
            ({"cold_start": {"stpes": 3}}, "did you mean 'steps'"),
            ({"cold_start": {"steps": 0}}, "at least 1"),
            ({"cold_start": {"lr": -1.0}}, "above 0"),
        ],
    )
    def test_language_model(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            valid(GTPOConfig().language_model(**settings))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"estimator": "grpo"}, "no effect with estimator='grpo'"),
            ({"overlong_penalty": 0.0}, "above 0"),
            ({"overlong_buffer": 0}, "at least 1"),
            ({"overlong_buffer": 2000}, "every trajectory would be punished"),
        ],
    )
    def test_overlong_penalty(self, settings, message):
        config = GTPOConfig().rollouts(max_tokens=1000).training(overlong="penalty")
        valid(config)
        with pytest.raises(ConfigError, match=message):
            valid(config.training(**settings))

    def test_rewards(self):
        with pytest.raises(ConfigError, match="size of the penalty"):
            valid(GTPOConfig().rewards(format_penalty=-0.1))

    def test_evaluation(self):
        with pytest.raises(ConfigError, match="number of episodes"):
            valid(GTPOConfig().evaluation(evaluation_duration_unit="timesteps"))

    def test_more_learners_than_groups(self):
        with pytest.raises(ConfigError, match="nothing to do"):
            valid(GTPOConfig().training(groups_per_step=1).learners(num_learners=2))

    def test_sft_without_a_cold_start(self):
        with pytest.raises(ConfigError, match="cold_start"):
            valid(SFTConfig().language_model(cold_start=None))


class TestDicts:
    def test_the_same_keys_flat(self):
        config = GTPOConfig().update_from_dict(
            {
                "model": "some/model",
                "gamma": 0.5,
                "group_size": 4,
                "evaluation_split": "test",
                "max_turns": 3,
                "env_config": {"count": 2},
                "optimizer": {"name": "SGD"},
            }
        )
        assert config.language_model_source == "some/model"
        assert (config.gamma, config.group_size, config.max_turns) == (0.5, 4, 3)
        assert (config.evaluation_split, config.optimizer) == ("test", {"name": "SGD"})
        assert config.env_config == {"count": 2}

    @pytest.mark.parametrize(
        ("key", "near"),
        [("group_sise", "group_size"), ("gama", "gamma"), ("num_env_runer", "num_env_runners")],
    )
    def test_an_unknown_key_names_the_nearest(self, key, near):
        with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
            GTPOConfig().update_from_dict({key: 1})

    def test_model_config_is_redirected(self):
        with pytest.raises(ConfigError, match="language_model"):
            GTPOConfig().update_from_dict({"model_config": {}})

    def test_a_config_survives_its_own_dict(self):
        """Tune turns configs into dicts and back."""
        config = valid(
            GTPOConfig().language_model(model="some/model").training(group_size=3, lr=1e-3)
        )
        again = GTPOConfig().update_from_dict(config.to_dict())
        assert again.language_model_source == "some/model"
        assert (again.group_size, again.lr, again.optimizer) == (3, 1e-3, config.optimizer)
        again.validate()


def test_every_tuned_example_is_valid():
    """A sweep's with each of its combinations."""
    import importlib.util
    from pathlib import Path

    from rllib_gtpo.command.tuning import varied_variants

    folder = Path(__file__).parents[1] / "tuned_examples"
    files = sorted(folder.glob("*.py"))
    assert files
    for file in files:
        spec = importlib.util.spec_from_file_location(f"tuned_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if module.config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            with pytest.raises(ConfigError, match="not installed"):
                module.config.validate()
        else:
            for _, settings in varied_variants(module.config, 16):
                module.config.copy(copy_frozen=False).update_from_dict(settings).validate()
        assert module.stop
        assert "Results to expect" in module.__doc__


def test_grpo_is_a_preset():
    config = valid(GRPOConfig())
    assert config.estimator == "grpo"
    assert config.algo_class.__name__ == "GRPO"


def test_importing_is_light_and_the_pure_parts_know_no_ray():
    import subprocess
    import sys

    def loaded(*modules):
        heavy = ("ray", "torch", "transformers", "vllm")
        code = f"import sys, {', '.join(modules)}; print(*(m for m in {heavy} if m in sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert loaded("rllib_gtpo", "rllib_gtpo.types", "rllib_gtpo.sandbox") == []
    pure = ("ops.advantages", "ops.losses", "ops.logprobs", "ops.returns", "packing")
    assert loaded(*(f"rllib_gtpo.{name}" for name in pure)) == ["torch"]
    knowing_torch = ("chat", "models", "engines.hf", "language_model", "strategies")
    assert "ray" not in loaded(*(f"rllib_gtpo.{name}" for name in knowing_torch))


def test_the_names_are_known_to_tune():
    from ray.tune.registry import get_trainable_cls

    for name in ("GTPO", "GRPO", "SFT"):
        assert get_trainable_cls(name).__name__ == name
