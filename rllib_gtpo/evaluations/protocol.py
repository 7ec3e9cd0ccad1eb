"""What a policy is evaluated on, and how: the settings of an algorithm that only evaluates."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rllib_gtpo.command.files import check_env
from rllib_gtpo.command.settings import apply_overrides
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.evaluations.policy import Policy

_RECORDED = (
    *("top_p", "max_turns", "max_turn_tokens", "max_tokens", "max_invalid_calls"),
    *("call_format", "engine", "env_config"),
)
_OF_TASKS = ("splits", "samples_per_task", "temperature", "seed")


@dataclass(frozen=True)
class Protocol:
    """Tasks, samples and the sampler's keys; None leaves a thing to the policy's own settings.

    splits: Of the environment.
    tasks: The first so many of each split; None: all.  Of other algorithms, episodes.
    seed: Part of the sampler's keys.
    env: Another environment, by a name that RLlib takes.
    overrides: "key=value" of settings.
    """

    splits: tuple[str, ...] | None = None
    samples_per_task: int | None = None
    tasks: int | None = None
    temperature: float | None = None
    seed: int | None = None
    env: str | None = None
    overrides: Sequence[str] = field(default=())
    num_env_runners: int | None = None

    def filled(self, settings: Any) -> Protocol:
        """With the values of a configuration that was made by it, for another policy."""
        return replace(
            self,
            splits=tuple(_listed(settings.evaluation_split)),
            samples_per_task=settings.evaluation_samples_per_task,
            temperature=settings.evaluation_temperature,
            seed=settings.seed or 0,
        )

    def following(self, about: dict[str, Any]) -> Protocol:
        """With what results in a file were made with, where nothing else is said."""
        known = about.get("settings", {})
        return replace(
            self,
            splits=self.splits or tuple(about["splits"]),
            **{
                name: known.get(name) if getattr(self, name) is None else getattr(self, name)
                for name in ("samples_per_task", "tasks", "temperature", "seed")
            },
        )


def evaluation_settings(policy: Policy, protocol: Protocol) -> Any:
    """The configuration of an algorithm that evaluates a policy as the protocol says.

    The learners of the training, and what spreads a model over them, are not needed.

    Raises:
        ConfigError: A setting is unknown, or has no effect.
        DataError: A split does not exist, or has no tasks.
    """
    settings = policy.config.copy(copy_frozen=False).get_evaluation_config_object()
    settings.in_evaluation = False
    settings.learners(num_learners=0)
    if policy.is_language_model:
        _leave_training_out(settings)
    if protocol.env is not None:
        settings.environment(protocol.env)
        settings.env_config = {}
    runners = policy.config.evaluation_num_env_runners or policy.config.num_env_runners
    settings.env_runners(num_env_runners=0)
    settings.evaluation(
        evaluation_interval=1,
        evaluation_parallel_to_training=False,
        evaluation_num_env_runners=runners,
    )
    apply_overrides(settings, protocol.overrides)
    check_env(settings, "--env: ")
    if policy.is_language_model:
        settings.environment(_class_named(settings.env))
    if protocol.num_env_runners is not None:
        settings.evaluation(evaluation_num_env_runners=protocol.num_env_runners)
    if policy.is_language_model:
        _choose_tasks(settings, protocol)
    else:
        _choose_episodes(settings, protocol, policy.algorithm)
    return settings


def recorded_settings(settings: Any, protocol: Protocol) -> dict[str, Any]:
    """What a file of results says of them."""
    return {
        "samples_per_task": settings.evaluation_samples_per_task,
        "tasks": protocol.tasks,
        "temperature": settings.evaluation_temperature,
        "seed": settings.seed or 0,
        **{name: getattr(settings, name) for name in _RECORDED},
    }


def _class_named(env: Any) -> Any:
    """The class of "MODULE.CLASS", to which RLlib would give env_config as keywords."""
    from ray.tune.registry import ENV_CREATOR, _global_registry

    registered = isinstance(env, str) and _global_registry.contains(ENV_CREATOR, env)
    if not isinstance(env, str) or registered or "." not in env or ":" in env:
        return env
    module, _, name = env.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _leave_training_out(settings: Any) -> None:
    settings.learners(
        strategy="auto", strategy_options={}, activation_checkpointing=False, torch_compile=False
    )
    if settings.engine != "vllm":  # whose engines get their weights from a learner's device
        settings.learners(num_gpus_per_learner=0)
    settings.rollouts(placement="separate")
    settings.reporting(record="none")
    for name in ("engine_pool", "learner_bundles"):  # of the run that has ended
        vars(settings).pop(name, None)


def _choose_tasks(settings: Any, protocol: Protocol) -> None:
    if protocol.splits:
        chosen = protocol.splits
        settings.evaluation(split=chosen[0] if len(chosen) == 1 else list(chosen))
    if protocol.samples_per_task is not None:
        settings.evaluation(samples_per_task=protocol.samples_per_task)
    if protocol.temperature is not None:
        settings.evaluation(temperature=protocol.temperature)
    if protocol.seed is not None:
        settings.debugging(seed=protocol.seed)
    samples = settings.evaluation_samples_per_task
    if settings.evaluation_temperature == 0 and samples > 1:
        raise ConfigError(
            f"{samples} samples of each task at temperature 0 are all the same: use "
            "--samples-per-task 1, or a temperature above 0."
        )
    longest = max(_count_tasks(settings, split) for split in _listed(settings.evaluation_split))
    settings.evaluation(evaluation_duration=samples * min(longest, protocol.tasks or longest))


def _count_tasks(settings: Any, split: str) -> int:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.env.env_context import EnvContext

    from rllib_gtpo.text_env import as_tool_env

    _, create = Algorithm._get_env_id_and_creator(settings.env, settings)
    env = as_tool_env(create(EnvContext(settings.env_config, worker_index=0)))
    name = type(env).__name__
    try:
        count = sum(1 for _ in env.tasks(split))
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}.tasks({split!r}) raised {type(error).__name__}: {error}. Is there such a "
            "split? Name another one with --split."
        ) from error
    finally:
        env.close()
    if not count:
        raise DataError(f"{name}.tasks({split!r}) has no rows: name another split with --split.")
    return count


def _choose_episodes(settings: Any, protocol: Protocol, algorithm: str) -> None:
    for name in _OF_TASKS[:-1]:
        if getattr(protocol, name) is not None:
            option = {"splits": "split"}.get(name, name).replace("_", "-")
            raise ConfigError(
                f"--{option} has no effect on {algorithm}, which is evaluated on episodes of its "
                "environment: leave it out."
            )
    settings.evaluation(evaluation_duration_unit="episodes")
    if protocol.tasks is not None or settings.evaluation_duration == "auto":
        settings.evaluation(evaluation_duration=protocol.tasks or 10)
    if protocol.seed is not None:
        settings.debugging(seed=protocol.seed)


def _listed(split: str | Sequence[str]) -> list[str]:
    return [split] if isinstance(split, str) else list(split)
