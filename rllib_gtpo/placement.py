"""Where learners and engines are: on devices of their own, or by turns on the same ones.

Shared, a bundle of a Ray placement group has a whole device.  A learner takes more than half of it
and an engine the rest, so that each bundle gets one of either and Ray gives both the same device.
What they take is Ray's bookkeeping: the engine gives its memory back while the learner works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rllib_gtpo.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rllib_gtpo.config import GTPOConfig

SEPARATE, SHARED = "separate", "shared"
PLACEMENTS = (SEPARATE, SHARED)
RESERVE_TIMEOUT_S = 100.0
# vLLM's levels of sleep: weights wait in the host's memory, or are dropped, for learners send all.
KEEP_WEIGHTS, DROP_WEIGHTS = 1, 2
Bundle = dict[str, float]


@dataclass(frozen=True)
class Bundles:
    """As many bundles of a placement group as there are engines, from `first` on."""

    group: PlacementGroup
    first: int

    def options(self, index: int) -> dict[str, Any]:
        """Ray's options for what goes into one of them."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, self.first + index)
        return {"scheduling_strategy": strategy}


def check_shared(config: GTPOConfig, workers: int, *, cpu: bool) -> None:
    """Raises ConfigError for what cannot share devices; `workers`: of an engine."""
    if config.num_learners < 1:
        raise ConfigError(
            "placement='shared' needs learners in processes of their own, so that Ray gives them "
            "the devices of the engines: set num_learners to 1 or more."
        )
    if config.num_engines != config.num_learners or workers > 1:
        raise ConfigError(
            f"placement='shared' is for one engine of one device with each learner: set "
            f"num_engines={config.num_learners}, and leave out tensor_parallel_size and "
            "pipeline_parallel_size."
        )
    if not cpu and not 0.5 < config.num_gpus_per_learner < 1.0:
        raise ConfigError(
            f"num_gpus_per_learner={config.num_gpus_per_learner}: with placement='shared' a "
            "learner takes more than half of a GPU and less than all, such as 0.6; the engine "
            "takes the rest."
        )


def with_engines(
    bundles: Sequence[Bundle], engine: Bundle, count: int, *, shared: bool
) -> list[Bundle]:
    """RLlib's bundles and the engines': in those of the learners, which are the last ones, or
    behind all others, which count by position."""
    if not shared:
        return [*bundles, *([engine] * count if any(engine.values()) else [])]
    first = len(bundles) - count
    return [
        *bundles[:first],
        *(
            {k: round(b.get(k, 0) + engine.get(k, 0), 4) for k in {**b, **engine}}
            for b in bundles[first:]
        ),
    ]


def reserve(bundles: Sequence[Bundle]) -> tuple[Bundles, PlacementGroup | None]:
    """Bundles for learners and engines: the last ones of the placement group that this process is
    in, as it is under Tune, or those of a new one.

    Returns:
        The bundles, and the group if it is new: then learners must be told, and somebody must
        remove it.
    """
    import ray

    current = ray.util.get_current_placement_group()
    if current is not None:
        return Bundles(current, len(current.bundle_specs) - len(bundles)), None
    held = [{k: v for k, v in bundle.items() if v} for bundle in bundles]
    group = ray.util.placement_group(held, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=RESERVE_TIMEOUT_S)
    if not ready:
        ray.util.remove_placement_group(group)
        raise EngineError(
            f"Ray has no place for {held} within {RESERVE_TIMEOUT_S:.0f} s: it has "
            f"{ray.cluster_resources()}, of which {ray.available_resources()} are free."
        )
    return Bundles(group, 0), group


class Engines(Protocol):
    """What taking turns needs of the engines."""

    def sleep(self, level: int) -> None:
        """Gives their memory back."""

    def wake(self, tags: list[str] | None = None) -> None:
        """Takes it again."""


class Turns:
    """Learners and engines on the same devices, one after the other.

    Example:
        turns.learners()    # engines sleep; learners may use all memory
        turns.weights()     # engines have room for weights again; send them
        turns.engines()     # and for the cache: they may sample
    """

    def __init__(self, engines: Engines, level: int = DROP_WEIGHTS) -> None:
        self._engines, self._level = engines, level
        self._asleep = False

    def learners(self) -> None:
        """It is the learners' turn; nothing changes if it is already."""
        if not self._asleep:
            self._engines.sleep(self._level)
            self._asleep = True

    def weights(self) -> None:
        """Engines are about to get weights."""
        if self._asleep:
            self._engines.wake(["weights"])

    def engines(self) -> None:
        """They have them, and it is their turn."""
        if self._asleep:
            self._engines.wake(["kv_cache"])
            self._asleep = False
