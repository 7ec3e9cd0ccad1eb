"""MLflow for runs and sweeps; docs/tracking.md shows it, and W&B, which needs nothing of ours."""

from __future__ import annotations

from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback


class MLflowLogger(MLflowLoggerCallback):  # type: ignore[misc]
    """Tune's callback, with names that MLflow takes: evaluation/avg@4 is evaluation/avg_at_4."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """See MLflowLoggerCallback."""
        super().log_trial_result(iteration, trial, _renamed(result))


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        str(name).replace("@", "_at_"): _renamed(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name != "config"
    }
