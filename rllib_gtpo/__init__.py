"""Train LLM agents that use tools over many turns, on Ray RLlib, with credit for every turn.

Importing this package is light (neither torch nor ray is loaded) and makes the algorithms "GTPO",
"GRPO" and "SFT" known to RLlib and Tune by name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rllib_gtpo.registration import register_algorithms

if TYPE_CHECKING:
    from rllib_gtpo.algorithm import GRPO, GTPO
    from rllib_gtpo.config import GRPOConfig, GTPOConfig
    from rllib_gtpo.env import ToolEnv
    from rllib_gtpo.sft import SFT, SFTConfig

__version__ = "0.1.0"
__all__ = ["GRPO", "GTPO", "SFT", "GRPOConfig", "GTPOConfig", "SFTConfig", "ToolEnv"]

_HOME = {
    "GTPO": "algorithm",
    "GRPO": "algorithm",
    "SFT": "sft",
    "GTPOConfig": "config",
    "GRPOConfig": "config",
    "SFTConfig": "sft",
    "ToolEnv": "env",
}

register_algorithms(("GTPO", "GRPO", "SFT"), _HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"rllib_gtpo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rllib_gtpo' has no attribute {name!r}")
