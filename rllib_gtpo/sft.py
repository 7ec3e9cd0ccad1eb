"""SFT: supervised training on demonstrations as an RLlib Algorithm of its own.

An iteration is `steps_per_iteration` steps of `cold_start`, so that long supervised runs have
progress, metrics, checkpoints and evaluation like any other.
"""

from __future__ import annotations

import time
from typing import Any

from ray.rllib.algorithms.algorithm_config import NotProvided

from rllib_gtpo.algorithm import GTPO
from rllib_gtpo.config import GTPOConfig
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.progress import Progress
from rllib_gtpo.record.settings import NONE
from rllib_gtpo.supervision import supervise, validation_loss


class SFTConfig(GTPOConfig):
    """Configuration of SFT: `language_model(cold_start=...)` says what is trained, and how."""

    ALGORITHM = "SFT"

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class)
        self.cold_start = {}
        self.record = NONE  # there are no rollouts
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
        if self.record != NONE:
            raise ConfigError("record has no effect with SFT, which samples nothing: leave it out.")
        if self.steps_per_iteration < 1:
            raise ConfigError(f"steps_per_iteration={self.steps_per_iteration}: at least 1.")


class SFT(GTPO):
    """Supervised training; the checkpoint's weights can start a GTPO run."""

    @classmethod
    def get_default_config(cls) -> SFTConfig:
        """See Algorithm."""
        return SFTConfig()

    def training_step(self) -> None:
        """The next `steps_per_iteration` steps; the last iteration is shorter.

        Its `sft/validation_loss` is of the weights as they are then; when training has finished,
        at the last step or out of patience, they are those of the lowest loss.
        """
        start = self.cold_start
        assert start is not None
        data = self.load_demonstrations(start)
        self._learners_turn()
        made = self.progress_made.cold_start
        each = self.config.steps_per_iteration
        end = min((made.steps // each + 1) * each, start.steps)  # also after one that was left
        began = time.perf_counter()
        with Progress("supervised", end - made.steps, enabled=self.config.progress) as bar:
            losses = supervise(
                self.learner_group, data, start, made, end, progress=bar, stop=self.stop_requested
            )
        self.log_metrics(
            {
                **made.metrics("sft"),
                "sft/loss": sum(losses) / len(losses) if losses else float("nan"),
                "sft/validation_loss": validation_loss(self.learner_group, data),
                "sft/finished": float(made.finished(start)),
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
            f"validation {sft['validation_loss']:.4f} (best {sft['best_validation_loss']:.4f}, "
            f"step {sft['best_steps']:.0f})  {result['time']['update_s']:.1f}s"
        )
