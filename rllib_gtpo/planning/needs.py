"""What a configuration asks of each worker, and the workers that this makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rllib_gtpo.cold_start import ColdStart
from rllib_gtpo.models import load_config, max_positions
from rllib_gtpo.placement import SHARED
from rllib_gtpo.planning.cost import (
    IterationWork,
    LearnerWork,
    ModelCost,
    Parts,
    RolloutWork,
    compute_runner,
    host_copies,
    learner_moments,
    split_offloaded,
    worst,
)
from rllib_gtpo.strategies.base import strategy_name

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

GIB = float(1 << 30)
CUDA_CONTEXT = 0.6 * GIB  # what CUDA and its libraries take of a device
VLLM_SHARE = 0.92  # of a device, unless engine_config says otherwise
VLLM_CPU_CACHE = 256 << 20
PROCESS = "process"


@dataclass(frozen=True)
class EngineWork:
    """A vLLM engine: `share` of each of `devices` devices, or a cache of `cache` bytes on the CPU.

    context: tokens that its cache must at least hold.
    """

    count: int
    devices: int
    share: float
    cache: float
    context: int


@dataclass(frozen=True)
class Needs:
    """Everything that the workers follow from.

    process: bytes that Python and the libraries take in each process.
    learners, runners: in processes of their own; 0: in the driver.
    shared: whether a learner and an engine have one device, in turns.
    """

    model: ModelCost
    process: float
    learner: LearnerWork
    learners: int
    rollout: RolloutWork
    runners: int
    eval_runners: int
    engine: EngineWork | None
    iteration: IterationWork
    shared: bool = False


@dataclass(frozen=True)
class Worker:
    """Processes of one kind, and what each holds at its worst moment."""

    name: str
    count: int
    host: Parts
    device: Parts
    devices: int = 1

    @property
    def host_bytes(self) -> float:
        """Of one such process."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> float:
        """On each of its devices."""
        return sum(self.device.values())


def needs_of(
    config: GTPOConfig, model: ModelCost, optimizer: float, process: float, tokens: int | None
) -> Needs:
    """Reads a checked config.

    Args:
        config: Of the run.
        model: What the probe found.
        optimizer: Bytes of state for each byte of a parameter.
        process: Bytes of a process that has done nothing yet.
        tokens: Mean length of a trajectory; None: as long as the settings allow.
    """
    longest = longest_trajectory(config)
    trajectories = config.groups_per_step * config.group_size
    learners = max(1, config.num_learners)
    mine = -(-config.groups_per_step // learners) * config.group_size
    step = -(-mine // config.mini_batches) * longest
    budget = min(step, max(config.token_budget, longest))
    strategy = config.build_strategy()
    start = ColdStart.of(config.cold_start)
    on_device = config.num_gpus_per_learner > 0
    learner = LearnerWork(
        tokens=budget,
        micro_batches=-(-step // budget),
        strategy=strategy_name(config.strategy, config.num_learners),
        stage=int(strategy.chosen.get("stage", 2)),
        world=learners,
        offload=bool(strategy.chosen.get("offload")),
        # A cold start has an AdamW of its own, before the policy's optimizer has any state.
        optimizer=max(optimizer, 2.0 if start is not None else 0.0),
        master=config.dtype == "bfloat16" and config.lora is None,
        reference=bool(config.kl_coeff),
        keeps_best=start is not None,
        recomputes=config.activation_checkpointing,
        on_device=on_device,
    )
    samplers = config.num_engines if config.engine == "vllm" else max(1, config.num_env_runners)
    open_at_once = min(config.max_concurrency, -(-trajectories // max(1, config.num_env_runners)))
    own = dict(config.engine_config) if config.engine == "hf" else {}
    rollout = RolloutWork(
        open_at_once,
        longest,
        own.get("max_batch", 256),
        own.get("cache_tokens") or max(1 << 18, 4 * longest),
        own.get("prefill_tokens", 4096),
    )
    mean = tokens or longest
    iteration = IterationWork(
        trajectories=trajectories,
        tokens=mean,
        sampled=min(mean, config.max_turn_tokens * _turns(config)),
        samplers=samplers,
        concurrency=config.max_concurrency,
        learners=learners,
        epochs=config.epochs,
        anchors=config.epochs * config.mini_batches > 1,
        reference=bool(config.kl_coeff),
        recomputes=config.activation_checkpointing,
    )
    return Needs(
        model=model,
        process=process,
        learner=learner,
        learners=config.num_learners,
        rollout=rollout,
        runners=config.num_env_runners,
        eval_runners=config.evaluation_num_env_runners if config.evaluation_interval else 0,
        engine=_engine(config, longest) if config.engine == "vllm" else None,
        iteration=iteration,
        shared=config.placement == SHARED,
    )


def longest_trajectory(config: GTPOConfig) -> int:
    """Tokens of the longest trajectory that the settings allow."""
    own = max_positions(load_config(config.language_model_source, config.tokenizer))
    return min(config.max_tokens or own, own)


def _turns(config: GTPOConfig) -> int:
    """Most turns of a trajectory; 1 where only the environment knows."""
    return int(config.max_turns or getattr(config.env, "max_turns", None) or 1)


def _engine(config: GTPOConfig, context: int) -> EngineWork:
    from rllib_gtpo.engines.vllm import EngineSettings

    settings = EngineSettings.of(config)
    options: dict[str, Any] = settings.options
    own_share = VLLM_SHARE if settings.learner_share is None else 1.0 - settings.learner_share
    return EngineWork(
        count=settings.num_engines,
        devices=0 if settings.cpu else settings.workers,
        share=float(options.get("gpu_memory_utilization", own_share)),
        cache=float(options.get("kv_cache_memory_bytes") or VLLM_CPU_CACHE),
        context=context,
    )


def workers_of(needs: Needs, device_memory: float | None) -> list[Worker]:
    """All processes of a run.

    device_memory: Of each accelerator; None if it is not known.
    """
    process = {PROCESS: needs.process}
    learner_host, learner_device = _learner(needs)
    driver = dict(process)
    workers = []
    if needs.learners:
        workers.append(
            Worker("learner", needs.learners, {**process, **learner_host}, learner_device)
        )
        learner_device = {}
    else:
        driver |= learner_host
    runner: Parts = {}
    if needs.engine is None:
        runner = compute_runner(needs.model, needs.rollout)
    named = {f"rollout {name}": size for name, size in runner.items()}
    if needs.runners:
        workers.append(Worker("env runner", needs.runners, {**process, **named}, {}))
    else:
        driver |= named
    if needs.eval_runners:
        workers.append(Worker("evaluation runner", needs.eval_runners, {**process, **named}, {}))
    if needs.engine is not None:
        workers.append(_engine_worker(needs, needs.engine, device_memory))
    return [Worker("driver", 1, driver, learner_device), *workers]


def turns_of(needs: Needs, workers: list[Worker]) -> Parts:
    """Of a device that a learner and an engine share, while the engine is awake; nothing if they
    do not.  While the learner works it needs no more than the learner."""
    if not needs.shared:
        return {}
    waiting = ("CUDA", "parameters", "optimizer", "master weights", "reference")
    learner, engine = (next(w for w in workers if w.name == n) for n in ("learner", "engine"))
    kept = {f"learner's {k}": v for k, v in learner.device.items() if k in waiting}
    return {**kept, **{f"engine's {k}": v for k, v in engine.device.items()}} if kept else {}


def _learner(needs: Needs) -> tuple[Parts, Parts]:
    """Parts on the host, without the process, and on the device."""
    work = needs.learner
    moments = learner_moments(needs.model, work)
    if not work.on_device:
        return worst(moments), {}
    split = {name: split_offloaded(parts, work.offload) for name, parts in moments.items()}
    device = worst({name: parts for name, (parts, _) in split.items()})
    waiting = worst({name: parts for name, (_, parts) in split.items()})
    copies = {**host_copies(needs.model, work), "copy of weights": needs.model.message}
    host = {name: size for name, size in {**waiting, **copies}.items() if size}
    return host, {"CUDA": CUDA_CONTEXT, **device}


def _engine_worker(needs: Needs, engine: EngineWork, device_memory: float | None) -> Worker:
    process = {PROCESS: needs.process}
    weights = needs.model.weights
    if not engine.devices:
        held = {"parameters": weights, "KV cache": engine.cache, "new weights": weights}
        return Worker("engine", engine.count, {**process, **held}, {}, 0)
    mine = weights / engine.devices
    least = needs.model.kv * engine.context / engine.devices
    # vLLM takes its whole share of the device; without knowing it, what one context needs.
    room = 0.0 if device_memory is None else engine.share * device_memory - mine - CUDA_CONTEXT
    device = {"CUDA": CUDA_CONTEXT, "parameters": mine, "KV cache": max(least, room)}
    return Worker("engine", engine.count, process, device, engine.devices)


def total_host(workers: list[Worker]) -> float:
    """Of all processes together."""
    return sum(worker.count * worker.host_bytes for worker in workers)


def fits(needs: Needs, host: float | None, device: float | None) -> bool:
    """Whether all workers fit; a limit that is not known refuses nothing."""
    workers = workers_of(needs, device)
    if host is not None and total_host(workers) > host:
        return False
    turns = sum(turns_of(needs, workers).values())
    return device is None or max(turns, *(w.device_bytes for w in workers)) <= device
