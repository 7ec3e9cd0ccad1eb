"""What every registered estimator says about the same groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rllib_gtpo.connectors.learner import credit_of
from rllib_gtpo.ops.advantages import ESTIMATORS
from rllib_gtpo.types import Group


def compare_estimators(
    groups: Sequence[Group], about: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """The advantage of every turn of one iteration's groups, by estimator, each with its defaults.

    Those that look at the whole step (reinforce_pp) see only the groups that are given.

    Args:
        groups: See `rllib_gtpo.record.groups_of_rows`.
        about: What the record says of the run: gamma is taken from there.
    """
    found: dict[str, list[float | None]] = {}
    for name in ESTIMATORS:
        credit = credit_of(list(groups), name, float(about["gamma"]), {})
        values = credit.advantages.tolist()
        found[name] = [value if math.isfinite(value) else None for value in values]
    return found
