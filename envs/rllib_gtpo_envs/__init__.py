"""Ready-made tasks.

| class | task | tool |
|---|---|---|
| `Calculator` | `12+7*3-5`, worked out from left to right, one call per step | Python |
"""

from rllib_gtpo_envs.calculator import Calculator

__all__ = ["Calculator"]
