"""SFT: supervised training on demonstrations as an RLlib Algorithm of its own.

An iteration is `steps_per_iteration` steps of `cold_start`, so that long supervised runs have
progress, metrics, checkpoints and evaluation like any other.
"""

from __future__ import annotations

import time
from typing import Any

from ray.rllib.algorithms.algorithm_config import NotProvided

from rllib_gtpo.algorithm import GTPO
from rllib_gtpo.cold_start import supervise, validation_loss
from rllib_gtpo.config import GTPOConfig
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.progress import Progress


class SFTConfig(GTPOConfig):
    """Configuration of SFT: `language_model(cold_start=...)` says what is trained, and how."""

    ALGORITHM = "SFT"

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class)
        self.cold_start = {}
        self.steps_per_iteration = 50

    @classmethod
    def _algorithm_class(cls) -> Any:
        return SFT

    def training(self, *, steps_per_iteration: int = NotProvided, **kwargs: Any) -> SFTConfig:
        """GTPO's settings, and how many optimizer steps make an iteration."""
        super().training(**kwargs)
        self._set(steps_per_iteration=steps_per_iteration)
        return self

    def validate(self) -> None:
        """See GTPOConfig."""
        super().validate()
        if self.cold_start is None:
            raise ConfigError("SFT needs language_model(cold_start={...}).")
        if self.steps_per_iteration < 1:
            raise ConfigError(f"steps_per_iteration={self.steps_per_iteration}: at least 1.")


class SFT(GTPO):
    """Supervised training; the checkpoint's weights can start a GTPO run."""

    @classmethod
    def get_default_config(cls) -> SFTConfig:
        """See Algorithm."""
        return SFTConfig()

    def training_step(self) -> None:
        """The next `steps_per_iteration` steps; the last iteration is shorter."""
        start = self.cold_start
        assert start is not None
        data = self.load_demonstrations(start)
        done = self.progress_made.cold_start_steps
        end = min(done + self.config.steps_per_iteration, start.steps)
        losses: list[float] = []
        began = time.perf_counter()
        with Progress("supervised", end - done, enabled=self.config.progress) as bar:

            def after_step(step: int, loss: float) -> None:
                losses.append(loss)
                self.progress_made.cold_start_steps = step + 1
                bar.step(note=f"loss {loss:.3f}")

            supervise(
                self.learner_group,
                data,
                start,
                range(done, end),
                after_step=after_step,
                stop=self.stop_requested,
            )
        self.log_metrics(
            {
                "sft/loss": sum(losses) / len(losses) if losses else float("nan"),
                "sft/validation_loss": validation_loss(self.learner_group, data),
                "sft/steps": float(end),
                "time/update_s": time.perf_counter() - began,
            }
        )
        self.sync_weights()

    def run_cold_start_once(self) -> None:
        """Training is the cold start here."""

    @staticmethod
    def summary_line(result: dict[str, Any]) -> str:
        """One line an iteration."""
        sft = result["sft"]
        return (
            f"iter {result['training_iteration']:3d}  step {sft['steps']:.0f}  loss "
            f"{sft['loss']:.4f}  "
            f"validation {sft['validation_loss']:.4f}  {result['time']['update_s']:.1f}s"
        )
