"""Ready-made tasks.

| class | task | tool |
|---|---|---|
| `PythonMath` | problems of any dataset, or word problems made from a seed | Python |
| `Calculator` | `12+7*3-5`, worked out from left to right, one call per step | Python |
| `Lookup` | `k7.boss.desk`: follow relations from key to key; each record names the next | look |
| `Repair` | mend the operators of a program until its tests pass | submit, runs it |
"""

from rllib_gtpo_envs.calculator import Calculator
from rllib_gtpo_envs.lookup import Lookup
from rllib_gtpo_envs.python_math import PythonMath
from rllib_gtpo_envs.repair import Repair

__all__ = ["Calculator", "Lookup", "PythonMath", "Repair"]
