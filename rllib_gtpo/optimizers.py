"""Any torch optimizer by name, tried out before a run starts; and how its learning rate changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from rllib_gtpo.errors import ConfigError, did_you_mean, refuse_unknown_keys

_CANNOT = {
    "LBFGS": "it computes the loss several times a step, and here gradients are summed once",
    "SparseAdam": "it is for sparse gradients, and those of a language model are dense",
    "Muon": "it is for matrices only, and models also have vectors",
}
_WHOLE_MATRICES = ("Adafactor",)
_DECAYS = ("constant", "linear", "cosine")


def build_optimizer(settings: Mapping[str, Any], parameters: Any) -> Any:
    """The optimizer of {"name", ...its keyword arguments}; RLlib's schedule sets `lr`."""
    options = dict(settings)
    optimizer_class = getattr(torch.optim, options.pop("name", "AdamW"))
    return optimizer_class(parameters, **{"lr": 1e-3, **options})


def check_optimizer(settings: Any, strategy: str) -> None:
    """Raises ConfigError for an optimizer that is unknown or cannot take a step here.

    strategy: The name of what its parameters are held by.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"optimizer={settings!r}: give a dict, such as {{'name': 'SGD', 'momentum': 0.9}}."
        )
    found = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    del found["Optimizer"]
    name = str(settings.get("name", "AdamW"))
    if name not in found:
        raise ConfigError(f"optimizer name={name!r} is unknown{did_you_mean(name, found)}")
    if name in _CANNOT:
        raise ConfigError(f"optimizer name={name!r} cannot be used: {_CANNOT[name]}. Use 'AdamW'.")
    known = [k for k in inspect.signature(found[name]).parameters if k not in ("params", "lr")]
    for key in settings:
        if key not in ("name", "lr", *known):
            raise ConfigError(
                f"optimizer has {key!r}, which {name} does not take{did_you_mean(key, known)}"
            )
    if name in _WHOLE_MATRICES and strategy in ("fsdp2", "deepspeed"):
        raise ConfigError(
            f"optimizer name={name!r} looks at whole matrices, and learners of "
            f"strategy={strategy!r} hold slices: use 'AdamW', or strategy='ddp'."
        )
    tried = [torch.nn.Parameter(torch.ones(size)) for size in ((2, 3), (3,))]
    for parameter in tried:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = build_optimizer(settings, tried)
        early = bool(optimizer.state)
        optimizer.step()
    except Exception as error:  # whatever its arguments make it raise
        raise ConfigError(f"optimizer={dict(settings)!r} cannot take a step: {error}") from error
    if early and strategy == "deepspeed":
        raise ConfigError(
            f"optimizer name={name!r} makes its state before DeepSpeed has cut the parameters: use "
            "'AdamW', or strategy='fsdp2'."
        )


@dataclass(frozen=True)
class LRSchedule:
    """Settings of `training(lr_schedule={...})`; `lr` is the peak.

    warmup: iterations in which the rate rises linearly to `lr`.
    decay: "constant", or "linear" or "cosine" from there on down to `final_frac` * lr.
    iterations: of the whole run, at whose end a decay is over; later ones stay at its end.
    final_frac: what is left of `lr` then.

    Example: {"warmup": 2, "decay": "linear", "iterations": 6} gives, in parts of `lr`,
        0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0, ...
    """

    warmup: int = 0
    decay: str = "constant"
    iterations: int | None = None
    final_frac: float = 0.0

    @staticmethod
    def of(settings: Mapping[str, Any] | None, lr: Any = 0.0) -> LRSchedule | None:
        """From a config's dict; unknown keys and impossible values raise ConfigError."""
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"lr_schedule={settings!r}: give a dict, such as {{'warmup': 10}}.")
        refuse_unknown_keys("lr_schedule", settings, [f.name for f in fields(LRSchedule)])
        made = LRSchedule(**settings)
        if not isinstance(lr, (int, float)):
            raise ConfigError(f"lr={lr!r} is a schedule itself: give a number beside lr_schedule.")
        if not isinstance(made.warmup, int) or made.warmup < 0:
            raise ConfigError(f"lr_schedule.warmup={made.warmup!r}: iterations, 0 or more.")
        if made.decay not in _DECAYS:
            raise ConfigError(
                f"lr_schedule.decay={made.decay!r} is unknown{did_you_mean(made.decay, _DECAYS)}"
            )
        decays = made.decay != "constant"
        if decays != isinstance(made.iterations, int) or (not decays and made.final_frac):
            raise ConfigError(
                f"lr_schedule: decay={made.decay!r} with iterations={made.iterations!r} and "
                f"final_frac={made.final_frac!r}: a decay needs the run's iterations, and without "
                "a decay neither has an effect."
            )
        if decays and made.iterations is not None and made.iterations <= made.warmup:
            raise ConfigError(
                f"lr_schedule.iterations={made.iterations}: must be more than "
                f"warmup={made.warmup}, which is a part of it."
            )
        if not isinstance(made.final_frac, (int, float)) or not 0.0 <= made.final_frac <= 1.0:
            raise ConfigError(f"lr_schedule.final_frac={made.final_frac!r}: must lie in [0, 1].")
        return made

    def factor(self, done: int) -> float:
        """What `lr` is multiplied by in an iteration after `done` others."""
        if done < self.warmup:
            return (done + 1) / self.warmup
        if self.iterations is None:
            return 1.0
        part = min(1.0, (done - self.warmup) / (self.iterations - self.warmup))
        left = 1.0 - part if self.decay == "linear" else (1.0 + math.cos(math.pi * part)) / 2.0
        return self.final_frac + (1.0 - self.final_frac) * left
