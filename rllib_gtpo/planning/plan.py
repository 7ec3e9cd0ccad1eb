"""The plan of a run: its workers, its time, whether it fits, and what to change if it does not."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.planning.cost import Speed, compute_seconds
from rllib_gtpo.planning.needs import (
    GIB,
    Needs,
    Worker,
    fits,
    needs_of,
    total_host,
    turns_of,
    workers_of,
)
from rllib_gtpo.planning.probe import measure, optimizer_ratio, warm_up
from rllib_gtpo.planning.remedies import remedies
from rllib_gtpo.tools.python import available_mb

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

UNPROBED_ENGINE = "vLLM is not probed: rollouts are those of engine='hf', which is slower"


@dataclass(frozen=True)
class Plan:
    """What `rllib plan` says.

    host, device: bytes that there are, of this machine and of each accelerator; None: not known,
        so that nothing is refused on their account.
    """

    needs: Needs
    workers: list[Worker]
    speed: Speed
    seconds: dict[str, float]
    probed_on: str
    host: float | None
    device: float | None
    remedies: list[str]

    @property
    def fits(self) -> bool:
        """Whether there is enough memory, as far as it is known how much there is."""
        return fits(self.needs, self.host, self.device)

    def to_dict(self) -> dict[str, Any]:
        """For a machine to read; sizes in bytes."""
        work = self.needs.iteration
        return {
            "fits": self.fits,
            "change": self.remedies,
            "memory": {"host": self.host, "device": self.device},
            "workers": [asdict(worker) for worker in self.workers],
            "host_bytes": total_host(self.workers),
            "model": asdict(self.needs.model),
            "probed_on": self.probed_on,
            "train_tokens_per_s": 1.0 / self.speed.train,
            "sampled_tokens_per_s": _sampled_per_second(self),
            "iteration": {"seconds": self.seconds, **asdict(work)},
        }

    def __str__(self) -> str:
        return "\n".join([*_table(self), *_time(self), *_verdict(self)])


def make_plan(
    config: GTPOConfig, *, memory: float | None = None, tokens: int | None = None
) -> Plan:
    """Plans the run of a checked config.

    Args:
        config: Of the run.
        memory: Bytes of each accelerator, or of the machine if workers have none; None: those of
            this machine.
        tokens: Mean length of a trajectory; None: as long as the settings allow.

    Raises:
        ConfigError: The config is not one of this package, or its model cannot be probed.
    """
    warm_up()
    process = resident_bytes()
    concurrency = min(config.max_concurrency, config.groups_per_step * config.group_size)
    found = measure(
        config,
        concurrency,
        _threads(config.num_learners, config.num_cpus_per_learner),
        _threads(config.num_env_runners, config.num_cpus_per_env_runner),
    )
    needs = needs_of(config, found.model, optimizer_ratio(config), process, tokens)
    on_device = any(worker.device for worker in workers_of(needs, None))
    here = torch.cuda.is_available()
    host: float | None = float(available_mb() << 20)
    device: float | None = None
    if not on_device:
        host = memory or host
    elif here:
        device = memory or float(torch.cuda.get_device_properties(0).total_memory)
    else:
        device, host = memory, None  # the run will be on another machine
    return Plan(
        needs=needs,
        workers=workers_of(needs, device),
        speed=found.speed,
        seconds=compute_seconds(found.speed, needs.iteration),
        probed_on=found.device,
        host=host,
        device=device,
        remedies=[] if fits(needs, host, device) else remedies(needs, host, device),
    )


def resident_bytes() -> float:
    """What this process holds in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _threads(processes: int, cpus: Any) -> int | None:
    """Threads of torch in workers of their own, as Ray sets them."""
    if not processes:
        return None
    return max(1, int(cpus)) if isinstance(cpus, (int, float)) else 1


def _sampled_per_second(plan: Plan) -> float:
    work = plan.needs.iteration
    return work.trajectories * work.sampled / plan.seconds["rollouts"]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(plan: Plan) -> list[str]:
    lines = ["GiB at the worst moment of each worker:"]
    for worker in plan.workers:
        for where, parts in (("", worker.host), (" (device)", worker.device)):
            if parts:
                whole = f"{worker.count} x {worker.name}{where}"
                lines.append(f"  {whole:<32}{_gib(sum(parts.values())):>8}")
                lines += [f"    {name:<30}{_gib(size):>8}" for name, size in parts.items()]
    if turns := turns_of(plan.needs, plan.workers):
        lines.append(f"  {'a shared device, engine awake':<32}{_gib(sum(turns.values())):>8}")
        lines += [f"    {name:<30}{_gib(size):>8}" for name, size in turns.items()]
    lines.append(f"  {'all, host memory':<32}{_gib(total_host(plan.workers)):>8}")
    return lines


def _time(plan: Plan) -> list[str]:
    work, needs = plan.needs.iteration, plan.needs
    seconds = sum(plan.seconds.values())
    lines = [
        f"{work.trajectories} trajectories of {work.tokens:.0f} tokens, "
        f"{work.sampled:.0f} sampled; {needs.learner.micro_batches} micro-batches of at most "
        f"{needs.learner.tokens} tokens a step",
        f"probed on {plan.probed_on}: a learner trains {1 / plan.speed.train:.0f} tokens/s, "
        f"rollouts sample {_sampled_per_second(plan):.0f} tokens/s",
        f"an iteration takes {seconds:.1f} s without tools: "
        + ", ".join(f"{name} {value:.1f} s" for name, value in plan.seconds.items()),
    ]
    return [*lines, UNPROBED_ENGINE] if needs.engine is not None else lines


def _verdict(plan: Plan) -> list[str]:
    known = [
        f"{_gib(size)} GiB {where}"
        for size, where in ((plan.host, "on the machine"), (plan.device, "on each device"))
        if size is not None
    ]
    if not known:
        return ["memory of the devices is not known here: give --memory GIB to have it checked"]
    there = " and ".join(known)
    if plan.fits:
        return [f"fits: there are {there}"]
    if not plan.remedies:
        return [f"does not fit: there are {there}, and no single setting changes that"]
    return [
        f"does not fit: there are {there}. Any of these would do:",
        *(f"  {change}" for change in plan.remedies),
    ]


def refuse_others(config: Any) -> GTPOConfig:
    """The config, if it is one that can be planned."""
    from rllib_gtpo.config import GTPOConfig

    if not isinstance(config, GTPOConfig):
        raise ConfigError(
            f"rllib plan is for GTPO, GRPO and SFT; the file has a {type(config).__name__}."
        )
    return config
