"""How a model is spread over learners, chosen by one setting; the numbers are the same."""

from __future__ import annotations

from rllib_gtpo.strategies.base import STRATEGIES, Strategy, build_strategy, strategy_name

__all__ = ["STRATEGIES", "Strategy", "build_strategy", "strategy_name"]
