"""The estimators that are compared, each with the options it is called with, and what is proved.

Theorems (one prompt's groups, undiscounted, every turn trained on once):
- `none` and `leave_one_out` with gamma 1, and `rloo`: unbiased.  The baseline does not depend on
  the trajectory itself, and the rewards before a turn do not depend on its action.
- `dr_grpo`: (G - 1)/G times the gradient, since the trajectory itself is one G-th of its own
  baseline.  So is `first_return` without std with gamma 1 where the only reward is at the end;
  else a group of equal totals gets 0 although its returns differ.
- Where the only reward is accuracy, 0 or 1, at the end, for one prompt: `grpo`, `grpo_sum`, and
  with gamma 1 `first_return` and weighted `group`, have the gradient's direction whatever the std
  does: their advantage depends only on the outcome and on the group's number of correct members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rllib_gtpo.ops.advantages import ESTIMATORS

MODES = ("none", "leave_one_out", "first_return", "group", "turn_index", "batch")
WITHOUT_STD = ("none", "leave_one_out")
WEIGHTED = ("group", "batch", "leave_one_out")


@dataclass(frozen=True)
class Variant:
    """A call of `turn_credit` behind the filter `uniform_groups`.

    theorem: "unbiased", "shrunk" by (G-1)/G, "shrunk_at_end" and "direction_at_end" if only for
        rewards at the end (the direction for one prompt and 0 or 1), or nothing.
    """

    label: str
    options: dict[str, Any]
    theorem: str = ""
    uniform_groups: str = "keep"

    @property
    def estimator(self) -> str:
        """The registered name."""
        return self.options["estimator"]

    @property
    def gamma(self) -> float:
        """The discount it runs with; 1 for the estimators that have none."""
        return self.options.get("gamma", ESTIMATORS[self.estimator].options.get("gamma", 1.0))

    @property
    def whole_step(self) -> bool:
        """Whether a group's credit depends on the other groups of the step."""
        return self.options.get("normalize") == "batch" or self.estimator == "reinforce_pp"


def gtpo(normalize: str, gamma: float, use_std: bool = True, weighted: bool = False) -> Variant:
    """GTPO with these options; only the ones that the mode takes are passed."""
    options: dict[str, Any] = {"estimator": "gtpo", "normalize": normalize, "gamma": gamma}
    label = f"gtpo {normalize}"
    if normalize not in WITHOUT_STD and not use_std:
        options["use_std"] = False
        label += " centred"
    if weighted:
        options["weight_trajectories"] = True
        label += " weighted"
    return Variant(
        f"{label} gamma={gamma:g}", options, gtpo_theorem(normalize, gamma, use_std, weighted)
    )


def gtpo_theorem(normalize: str, gamma: float, use_std: bool, weighted: bool) -> str:
    """What is proved about GTPO with these options."""
    if gamma != 1.0:
        return ""
    if normalize in WITHOUT_STD:
        return "unbiased"
    if normalize == "first_return":
        return "direction_at_end" if use_std else "shrunk_at_end"
    return "direction_at_end" if normalize == "group" and weighted else ""


def gtpo_variants(gamma: float) -> list[Variant]:
    """Every mode of GTPO with every combination of the options that it takes."""
    return [
        gtpo(mode, gamma, use_std, weighted)
        for mode in MODES
        for use_std in ((True,) if mode in WITHOUT_STD else (True, False))
        for weighted in ((False, True) if mode in WEIGHTED else (False,))
    ]


def other_variants() -> list[Variant]:
    """The other registered estimators."""
    gigpo = {"estimator": "gigpo"}
    return [
        Variant("grpo", {"estimator": "grpo"}, "direction_at_end"),
        Variant("grpo_sum", {"estimator": "grpo_sum"}, "direction_at_end"),
        Variant("dr_grpo", {"estimator": "dr_grpo"}, "shrunk"),
        Variant("rloo", {"estimator": "rloo"}, "unbiased"),
        Variant("reinforce_pp", {"estimator": "reinforce_pp"}),
        Variant("mt_grpo", {"estimator": "mt_grpo"}),
        Variant("gigpo gamma=0.9", gigpo),
        Variant("gigpo gamma=1", {**gigpo, "gamma": 1.0}),
        Variant("gigpo with std gamma=0.9", {**gigpo, "use_std": True}),
    ]


def filtered_variants() -> list[Variant]:
    """GTPO's default behind the two filters of uniform groups."""
    default = gtpo("group", 0.9)
    return [
        Variant(f"{default.label} {rule}", default.options, uniform_groups=rule)
        for rule in ("drop_solved", "drop")
    ]


def all_variants() -> list[Variant]:
    """GTPO undiscounted and with the default discount, filtered, then the others."""
    return [*gtpo_variants(1.0), *gtpo_variants(0.9), *filtered_variants(), *other_variants()]
