"""Refuses settings that are unknown, contradictory or without effect, and says how to mend them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_gtpo.chat import call_format
from rllib_gtpo.cold_start import ColdStart
from rllib_gtpo.engines.hf import HFEngine
from rllib_gtpo.engines.vllm import check_vllm
from rllib_gtpo.errors import ConfigError, did_you_mean, refuse_unknown_keys
from rllib_gtpo.lora import check_lora
from rllib_gtpo.models import check_source
from rllib_gtpo.ops.advantages import ESTIMATORS
from rllib_gtpo.ops.losses import Objective
from rllib_gtpo.optimizers import check_optimizer
from rllib_gtpo.placement import PLACEMENTS, SHARED
from rllib_gtpo.record.settings import RecordSettings
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.shaping import INPUTS, MODES, ON_FAILURE
from rllib_gtpo.tools.shipping import refuse_unserialisable

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

DEFAULT_GAMMA = 0.9
_UNIFORM = ("keep", "drop_solved", "drop")
_ENGINES = ("hf", "vllm")
_OUTCOME_ONLY = ("grpo", "mt_grpo")  # what the last turn gets besides accuracy does not reach them
_SHAPING_DEFAULTS = {
    "shaping_alpha": 0.5,
    "shaping_input": "code",
    "embedder": "python_tokens",
    "on_embedder_failure": "stop",
}
_STRAGGLERS = ("wait", "drop")
_OVERLONG = ("keep", "mask", "penalty")
_OVERLONG_DEFAULTS = {"overlong_penalty": 1.0, "overlong_buffer": None}
_NUMBERS = (
    "gamma",
    "temperature",
    "evaluation_temperature",
    "top_p",
    "format_penalty",
    "penalize_tool_errors",
    "shaping_alpha",
    "overlong_penalty",
    "oversample",
)
_DTYPES = ("float32", "bfloat16")


def check(config: GTPOConfig) -> None:
    """Raises ConfigError for the first setting that cannot stand."""
    _numbers(config)
    _credit(config)
    _sampling(config)
    _model(config)
    _shaping(config)
    _groups(config)
    _evaluation(config)
    _without_effect(config)
    refuse_unserialisable(config.env, config.env_config or {})
    config.build_objective()
    RecordSettings.of(config.record)


def _numbers(config: GTPOConfig) -> None:
    """Before anything is compared with them: YAML may hold text, or NaN."""
    for name in _NUMBERS:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ConfigError(f"{name}={value!r}: must be a number.")


def _credit(config: GTPOConfig) -> None:
    if config.group_size < 2:
        raise ConfigError(
            f"group_size={config.group_size}: a group needs at least 2 trajectories, since "
            "advantages compare them with each other; 8 is a good start."
        )
    if config.estimator not in ESTIMATORS:
        raise ConfigError(_one_of("estimator", config.estimator, ESTIMATORS))
    chosen = ESTIMATORS[config.estimator]
    if "gamma" in config.estimator_options:
        raise ConfigError("estimator_options has 'gamma'; set it with training(gamma=...).")
    chosen.resolve(config.estimator_options)
    if not 0.0 <= config.gamma <= 1.0:
        raise ConfigError(f"gamma={config.gamma}: must lie in [0, 1].")
    if "gamma" not in chosen.options and config.gamma != DEFAULT_GAMMA:
        raise ConfigError(
            f"gamma={config.gamma} has no effect with estimator={config.estimator!r}, which "
            "does not discount: leave it out."
        )
    if config.uniform_groups not in _UNIFORM:
        raise ConfigError(_one_of("uniform_groups", config.uniform_groups, _UNIFORM))
    for name in ("groups_per_step", "mini_batches", "epochs", "token_budget"):
        _positive(name, getattr(config, name))
    if config.mini_batches > config.groups_per_step:
        raise ConfigError(
            f"mini_batches={config.mini_batches} is more than "
            f"groups_per_step={config.groups_per_step}: "
            "mini-batches are whole groups, so some would be empty."
        )
    for name in ("num_learners", "num_env_runners"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}={getattr(config, name)}: 0 or more.")
    if config.num_learners > config.groups_per_step:
        raise ConfigError(
            f"num_learners={config.num_learners} is more than "
            f"groups_per_step={config.groups_per_step}: "
            "a group goes to one learner, so some would have nothing to do."
        )


def _sampling(config: GTPOConfig) -> None:
    if config.engine not in _ENGINES:
        raise ConfigError(_one_of("engine", config.engine, _ENGINES))
    if config.placement not in PLACEMENTS:
        raise ConfigError(_one_of("placement", config.placement, PLACEMENTS))
    if config.engine == "vllm":
        check_vllm(config)
    elif config.placement == SHARED:
        raise ConfigError(
            "placement='shared' has no effect with engine='hf', whose model is in the env runners: "
            "use engine='vllm', or leave it out."
        )
    if config.engine == "hf":
        known = inspect.signature(HFEngine).parameters.keys() - {"model", "max_context"}
        refuse_unknown_keys("engine_config", config.engine_config, sorted(known))
    if config.temperature <= 0.0:
        raise ConfigError(
            f"temperature={config.temperature}: training samples need a temperature above 0, "
            "or all members of a group are the same."
        )
    if config.evaluation_temperature < 0.0:
        raise ConfigError(f"evaluation temperature={config.evaluation_temperature}: at least 0.")
    if not 0.0 < config.top_p <= 1.0:
        raise ConfigError(f"top_p={config.top_p}: must lie in (0, 1].")
    for name in (
        "max_turn_tokens",
        "max_concurrency",
        "evaluation_samples_per_task",
        "num_engines",
    ):
        _positive(name, getattr(config, name))
    for name in ("max_turns", "max_tokens", "max_invalid_calls"):
        if getattr(config, name) is not None:
            _positive(name, getattr(config, name))
    if config.max_tokens is not None and config.max_turn_tokens > config.max_tokens:
        raise ConfigError(
            f"max_turn_tokens={config.max_turn_tokens} is more than "
            f"max_tokens={config.max_tokens}: one turn cannot be longer than the trajectory."
        )
    if config.engine == "hf" and config.num_engines != 1:
        raise ConfigError(
            f"num_engines={config.num_engines} has no effect with engine='hf', of which each env "
            "runner has its own: use engine='vllm', or more env runners."
        )
    if config.stragglers not in _STRAGGLERS:
        raise ConfigError(_one_of("stragglers", config.stragglers, _STRAGGLERS))
    if config.oversample < 0.0 or (config.stragglers == "drop") != (config.oversample > 0.0):
        raise ConfigError(
            f"stragglers={config.stragglers!r} with oversample={config.oversample}: to drop the "
            "slowest groups, more must be rolled out than are needed (stragglers='drop', "
            "oversample=0.25); to wait for all, leave both out."
        )
    if config.stragglers == "drop" and config.deterministic:
        raise ConfigError("stragglers='drop' depends on time: it cannot be deterministic.")
    for name in ("format_penalty", "penalize_tool_errors"):
        if getattr(config, name) < 0.0:
            raise ConfigError(
                f"{name}={getattr(config, name)}: give the size of the penalty, at least 0."
            )


def _shaping(config: GTPOConfig) -> None:
    for name, valid in (
        ("shaping", MODES),
        ("shaping_input", INPUTS),
        ("on_embedder_failure", ON_FAILURE),
    ):
        if getattr(config, name) not in valid:
            raise ConfigError(_one_of(name, getattr(config, name), valid))
    if not 0.0 < config.shaping_alpha <= 1.0:
        raise ConfigError(
            f"shaping_alpha={config.shaping_alpha}: must lie in (0, 1], or wrong code could be "
            "worth more than right code."
        )
    if config.shaping == "none":
        for name, default in _SHAPING_DEFAULTS.items():
            if getattr(config, name) != default:
                raise ConfigError(f"{name} has no effect unless shaping is set; leave it out.")
    elif config.estimator in _OUTCOME_ONLY:
        raise ConfigError(
            f"shaping={config.shaping!r} has no effect with estimator={config.estimator!r}, which "
            "takes the outcome and not the turns' rewards: leave it out, or use 'grpo_sum'."
        )
    else:
        build_embedder(config.embedder)


def _groups(config: GTPOConfig) -> None:
    """Which groups and tokens are trained on."""
    if not isinstance(config.resample_groups, int) or config.resample_groups < 0:
        raise ConfigError(
            f"resample_groups={config.resample_groups!r}: must be a whole number of at least 0."
        )
    if config.resample_groups and config.uniform_groups == "keep":
        raise ConfigError(
            f"resample_groups={config.resample_groups} has no effect with uniform_groups='keep', "
            "which drops no group: use 'drop' or 'drop_solved', or leave it out."
        )
    if config.overlong not in _OVERLONG:
        raise ConfigError(_one_of("overlong", config.overlong, _OVERLONG))
    if config.overlong != "penalty":
        for name, default in _OVERLONG_DEFAULTS.items():
            if getattr(config, name) != default:
                raise ConfigError(f"{name} has no effect unless overlong='penalty'; leave it out.")
        return
    if config.max_tokens is None:
        raise ConfigError(
            "overlong='penalty' has no effect without rollouts(max_tokens=...), the length that it "
            "grows up to: set that, or use overlong='mask'."
        )
    if config.estimator in _OUTCOME_ONLY:
        raise ConfigError(
            f"overlong='penalty' has no effect with estimator={config.estimator!r}, which takes "
            "the outcome and not the turns' rewards: use overlong='mask', or estimator='grpo_sum'."
        )
    if config.overlong_penalty <= 0.0:
        raise ConfigError(
            f"overlong_penalty={config.overlong_penalty}: give the size of the penalty, above 0."
        )
    if config.overlong_buffer is not None:
        _positive("overlong_buffer", config.overlong_buffer)
        if config.overlong_buffer > config.max_tokens:
            raise ConfigError(
                f"overlong_buffer={config.overlong_buffer} is more than "
                f"max_tokens={config.max_tokens}: every trajectory would be punished."
            )


def _model(config: GTPOConfig) -> None:
    if config.dtype not in _DTYPES:
        raise ConfigError(_one_of("dtype", config.dtype, _DTYPES))
    check_source(config.language_model_source, config.tokenizer)
    call_format(config.call_format)
    ColdStart.of(config.cold_start)
    check_lora(config)
    for switch in ("activation_checkpointing", "torch_compile"):
        if not isinstance(getattr(config, switch), bool):
            raise ConfigError(f"{switch}={getattr(config, switch)!r}: true or false.")
    strategy = config.build_strategy()
    check_optimizer(config.optimizer, strategy.name)
    if config.torch_compile and strategy.chosen.get("stage") == 3:
        raise ConfigError(
            "torch_compile with DeepSpeed's stage 3, which gathers weights inside the layers that "
            "would be compiled: use stage 2 or strategy='fsdp2', or leave torch_compile out."
        )
    if config.torch_compile_learner:
        raise ConfigError(
            "torch_compile_learner compiles what RLlib would run, which is replaced here: use "
            "learners(torch_compile=True)."
        )
    config.build_lr_schedule()
    if config.num_gpus_per_learner > 1:
        raise ConfigError(
            "num_gpus_per_learner: a learner uses one GPU; raise num_learners instead."
        )


def _evaluation(config: GTPOConfig) -> None:
    evaluation_splits(config)
    if config.evaluation_parallel_to_training:
        _parallel_evaluation(config)
    if config.evaluation_duration_unit != "episodes" or config.evaluation_duration == "auto":
        raise ConfigError(
            f"evaluation_duration={config.evaluation_duration!r} "
            f"({config.evaluation_duration_unit}): give a number of episodes."
        )


def _parallel_evaluation(config: GTPOConfig) -> None:
    """What evaluates while the weights change must not see the change."""
    from rllib_gtpo.evaluation import evaluate_split

    for reason, stands in (
        (
            "engine='vllm': its engines are those of the training and get new weights in between: "
            "leave it out, or use engine='hf'",
            config.engine == "vllm",
        ),
        (
            "create_local_env_runner=False: an evaluation runner that is restarted gets the "
            "weights that are evaluated from the local one: leave one of both out",
            not config.create_local_env_runner,
        ),
        (
            "a custom_evaluation_function of your own, which would not know that it is to train "
            "meanwhile: leave one of both out",
            config.custom_evaluation_function is not evaluate_split,
        ),
    ):
        if stands:
            raise ConfigError(f"evaluation_parallel_to_training does not go with {reason}.")


def evaluation_splits(config: GTPOConfig) -> list[str]:
    """The splits of an evaluation, of which there may be several: each is a dataset of its own."""
    given: Any = config.evaluation_split
    splits = [given] if isinstance(given, str) else given
    if (
        not isinstance(splits, (list, tuple))
        or not splits
        or not all(isinstance(split, str) for split in splits)
        or len(set(splits)) < len(splits)
    ):
        raise ConfigError(
            f"evaluation split={given!r}: the name of a split of the environment, or a list of "
            "different ones."
        )
    return list(splits)


def _without_effect(config: GTPOConfig) -> None:
    """Settings that would silently do nothing."""
    ours = "use group_size, groups_per_step, mini_batches, epochs and token_budget"
    defaults = AlgorithmConfig()
    for name in ("num_epochs", "minibatch_size", "train_batch_size"):
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(f"{name} has no effect here; {ours} instead.")
    if config.grad_clip_by != defaults.grad_clip_by:
        raise ConfigError("grad_clip_by has no effect here: gradients are clipped by global norm.")
    if "lr" in config.optimizer:
        raise ConfigError("optimizer has 'lr'; set it with training(lr=...).")
    objective = Objective()
    for name, needs in (("importance_cap", "importance_sampling"), ("kl_estimator", "kl_coeff")):
        off = getattr(config, needs) == getattr(objective, needs)
        if off and getattr(config, name) != getattr(objective, name):
            raise ConfigError(f"{name} has no effect unless {needs} is set; leave it out.")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1.")


def _one_of(name: str, value: Any, valid: Iterable[str]) -> str:
    return f"{name}={value!r} is unknown{did_you_mean(value, valid)}"
