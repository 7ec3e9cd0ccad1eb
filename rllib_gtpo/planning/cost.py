"""The cost model: bytes of each worker by what they are for, and seconds of an iteration.

Pure functions of numbers.  A worker has moments, each with the parts that it holds then; what it
needs is the largest sum.  Parts are those of the worst case: the longest trajectories that the
settings allow, in the fullest micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rllib_gtpo.ops.logprobs import KEPT, TILE, TILE_ON_DEVICE

Parts = dict[str, float]
"""Bytes by what they are for."""

LIVE_TILES = 3  # of logits: they, their exponentials, and what the gradient needs besides
BUCKET = 5 * 10**8  # elements of DeepSpeed's buckets, as it sets them by default
ALLOCATOR = 0.35  # of what comes and goes on a host: glibc keeps it in pieces that do not fit again
GATHERED_LAYERS = 2  # of a sharded model: the one that is computed, and the next
FLOAT32 = 4
FORWARD = 1 / 3  # of the time of a forward and backward pass


@dataclass(frozen=True)
class ModelCost:
    """A model as its learner has it.

    parameters, trained: elements.
    largest: elements of the largest trained tensor.
    layer, root: elements of a decoder layer, and of what lies outside of the layers.
    head: elements of the output head, 0 if it is not trained.
    element, trained_element: bytes of a parameter, and of a trained one.
    saved_layer, saved_rest: bytes that autograd keeps of a token, in a layer and elsewhere.
    boundary: bytes of a token's hidden state.
    kv: bytes of a token's keys and values, all layers.
    """

    parameters: int
    trained: int
    largest: int
    layer: int
    root: int
    head: int
    layers: int
    vocabulary: int
    element: int
    trained_element: int
    saved_layer: float
    saved_rest: float
    boundary: float
    kv: float

    @property
    def weights(self) -> float:
        """Bytes of all parameters."""
        return float(self.parameters * self.element)

    @property
    def message(self) -> float:
        """Bytes of what engines get of it: all, or the adapter."""
        return float(self.trained * self.trained_element if self.adapter else self.weights)

    @property
    def adapter(self) -> bool:
        """Whether most of it stays as it is."""
        return self.trained < self.parameters

    def gradients(self, *, master: bool) -> float:
        """Bytes of the gradient of what is trained; summed in float32 for master weights."""
        return float(self.trained * (FLOAT32 if master else self.trained_element))


@dataclass(frozen=True)
class LearnerWork:
    """What a learner does in an update.

    tokens: of its fullest micro-batch, padding included.
    micro_batches: of an optimizer step.
    world: how many learners share the work.
    optimizer: bytes of optimizer state for each byte of what it steps on.
    master: whether that is float32 weights beside those that compute.
    keeps_best: whether a cold start keeps its best weights.
    recomputes: whether activations are computed again in the backward pass.
    on_device: whether it has an accelerator.
    """

    tokens: int
    micro_batches: int
    strategy: str = "single"
    stage: int = 2
    world: int = 1
    offload: bool = False
    optimizer: float = 2.0
    master: bool = False
    reference: bool = False
    keeps_best: bool = False
    recomputes: bool = False
    on_device: bool = False


@dataclass(frozen=True)
class RolloutWork:
    """What an in-process engine does.

    trajectories: that are open at one time.
    context: tokens of the longest of them.
    max_batch, cache_tokens, prefill_tokens: the engine's own limits.
    """

    trajectories: int
    context: int
    max_batch: int = 256
    cache_tokens: int = 1 << 18
    prefill_tokens: int = 4096


def worst(moments: Mapping[str, Parts]) -> Parts:
    """The parts of the moment that needs most, without those that are nothing."""
    most = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {name: size for name, size in most.items() if size}


def compute_shares(strategy: str, stage: int, world: int) -> tuple[float, float, float]:
    """Which fraction of parameters, gradients and optimizer state a learner holds."""
    part = 1.0 / world
    if strategy == "fsdp2":
        return part, part, part
    if strategy == "deepspeed":
        return (part if stage == 3 else 1.0), (part if stage >= 2 else 1.0), part
    return 1.0, 1.0, 1.0


def compute_activations(model: ModelCost, work: LearnerWork) -> float:
    """What autograd keeps at the end of a forward pass, and as much as it keeps of one layer for
    what that layer's backward pass makes."""
    kept = model.boundary if work.recomputes else model.saved_layer
    recomputed = model.saved_layer if work.recomputes else 0.0
    return work.tokens * (model.layers * kept + model.saved_rest + model.saved_layer + recomputed)


def compute_logprob_chunk(model: ModelCost, on_device: bool) -> float:
    """Tiles of logits, and the head's gradient, which is summed in float32."""
    tile = TILE_ON_DEVICE if on_device else TILE
    return float(FLOAT32 * (LIVE_TILES * tile + KEPT + model.head))


def learner_moments(model: ModelCost, work: LearnerWork) -> dict[str, Parts]:
    """The backward pass, with gradients of earlier micro-batches if there are any; the optimizer's
    step; and, on a host, handing out the weights."""
    weights, gradients, state = compute_shares(work.strategy, work.stage, work.world)
    stepped_on = model.gradients(master=work.master)
    # FSDP2's slices are the master weights themselves; DeepSpeed's are sliced by themselves.
    sliced_masters = work.master and work.strategy == "fsdp2"
    kept: Parts = {
        "parameters": weights * (stepped_on if sliced_masters else model.weights),
        "optimizer": state * stepped_on * work.optimizer,
        "master weights": 0.0 if sliced_masters or not work.master else state * stepped_on,
        "reference": _reference(model, work),
    }
    full = gradients * stepped_on
    moments: dict[str, Parts] = {
        "backward": {
            "gradients": full if work.micro_batches > 1 else 0.0,
            "activations": compute_activations(model, work),
            "log-prob chunk": compute_logprob_chunk(model, work.on_device),
            "buckets": _buckets(model, work),
            "gathered layers": _gathered(model, work),
        },
        # Temporary values for one tensor after the other.
        "step": {
            "gradients": full,
            "step": 2.0 * gradients * model.largest * stepped_on / model.trained,
            "buckets": _buckets(model, work),
        },
    }
    if work.on_device:
        return {name: {**kept, **parts} for name, parts in moments.items()}
    moments["weights"] = {"copy of weights": model.message}
    return {
        name: {**kept, **parts, **host_copies(model, work), **_lost(parts)}
        for name, parts in moments.items()
    }


def host_copies(model: ModelCost, work: LearnerWork) -> Parts:
    """On the host all the time; the last message to the engines stays mapped until the next."""
    whole = work.strategy in ("fsdp2", "deepspeed")
    return {
        "weights for engines": model.message,
        "whole weights": model.message if whole else 0.0,
        "best weights": model.message if work.keeps_best else 0.0,
    }


def _lost(parts: Parts) -> Parts:
    return {"allocator": ALLOCATOR * sum(parts.values())}


def split_offloaded(parts: Parts, offload: bool) -> tuple[Parts, Parts]:
    """Which parts are on the device, and which wait on the host."""
    waiting = ("parameters", "gradients", "optimizer", "master weights") if offload else ()
    device = {name: size for name, size in parts.items() if name not in waiting}
    return device, {name: size for name, size in parts.items() if name in waiting}


def _reference(model: ModelCost, work: LearnerWork) -> float:
    if not work.reference or model.adapter:  # which is switched off for it
        return 0.0
    return model.weights / (work.world if work.strategy == "fsdp2" else 1)


def _gathered(model: ModelCost, work: LearnerWork) -> float:
    """Layers in full, with their gradients, and what lies outside of them."""
    sharded = work.strategy == "fsdp2" or (work.strategy == "deepspeed" and work.stage == 3)
    if not sharded or (work.world == 1 and not work.offload):
        return 0.0
    layers = min(GATHERED_LAYERS, model.layers) * model.layer
    return 2.0 * (layers + model.root) * model.element


def _buckets(model: ModelCost, work: LearnerWork) -> float:
    """In which gradients wait to be averaged."""
    if work.strategy == "ddp" and not work.master:
        return model.gradients(master=False)
    if work.strategy == "deepspeed":
        return float(min(model.trained, BUCKET) * model.element)
    return 0.0


def compute_runner(model: ModelCost, work: RolloutWork) -> Parts:
    """Sampling with an in-process engine, and taking new weights: the allocator hands hardly
    anything of the one on to the other."""
    rows = min(work.trajectories, work.max_batch)
    cells = min(_power_of_two(rows, 8, work.max_batch) * work.context, work.cache_tokens)
    prefill = min(work.prefill_tokens, rows * work.context)
    comes_and_goes = {
        "KV cache": cells * model.kv * (1 + 1 / model.layers),  # a layer is copied as it grows
        "activations": prefill * model.saved_layer,
        "logits": 4.0 * rows * model.vocabulary * FLOAT32,
        "copy of weights": model.message,
    }
    return {
        "parameters": model.weights,
        "weights from learners": model.message,
        **comes_and_goes,
        **_lost(comes_and_goes),
    }


def _power_of_two(count: int, least: int, most: int) -> int:
    return max(count, min(most, max(least, 1 << (count - 1).bit_length())))


@dataclass(frozen=True)
class Speed:
    """Of one worker, measured.

    train: seconds of a forward and backward pass for each token.
    decode: seconds of a step that samples a token for each of `rows`.
    step: seconds of a step with one row.
    """

    train: float
    step: float
    decode: float
    rows: int

    def step_seconds(self, rows: float) -> float:
        """Of a step with so many rows, on the line through the two that were measured."""
        slope = max(0.0, self.decode - self.step) / max(1, self.rows - 1)
        return self.step + slope * max(0.0, rows - 1)


@dataclass(frozen=True)
class IterationWork:
    """What an iteration does.

    trajectories, tokens: how many, and how long each is.
    sampled: of its tokens, those that the policy samples.
    passes: over the learner's tokens: forward and backward ones count 1.
    concurrency: trajectories that an env runner, or engine, has open at one time.
    """

    trajectories: int
    tokens: float
    sampled: float
    samplers: int
    concurrency: int
    learners: int
    epochs: int = 1
    anchors: bool = False
    reference: bool = False
    recomputes: bool = False

    @property
    def passes(self) -> float:
        """Over an iteration's tokens, forward and backward counted as one."""
        each = 1.0 + FORWARD * (self.reference + self.recomputes)
        return self.epochs * each + FORWARD * self.anchors


def compute_seconds(speed: Speed, work: IterationWork) -> dict[str, float]:
    """Of an iteration's rollouts and update; tools, credit and transfers are not in it."""
    mine = work.trajectories / work.samplers
    rows = min(mine, work.concurrency)
    steps = mine * work.sampled / max(rows, 1.0)
    prompts = mine * (work.tokens - work.sampled) * speed.train * FORWARD
    shared = work.trajectories * work.tokens / work.learners
    return {
        "rollouts": steps * speed.step_seconds(rows) + prompts,
        "update": shared * work.passes * speed.train,
    }
