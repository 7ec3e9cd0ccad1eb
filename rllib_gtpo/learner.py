"""The Learner: group-normalised turn credit, exact gradient accumulation, one optimizer step at a
time.

RLlib's own update loop knows neither accumulation nor ragged token batches, so `update` is replaced
as a whole; its hooks, optimizer registry, schedules, metrics and state are RLlib's.

However many learners there are and however their shards are cut into micro-batches, the gradient is
that of one loss over the global batch: every normaliser is summed over learners before it divides.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.rllib.core import COMPONENT_OPTIMIZER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import NUM_TRAINABLE_PARAMETERS
from torch import Tensor

from rllib_gtpo.connectors.learner import (
    CREDIT,
    CREDIT_S,
    DIAGNOSTICS,
    GROUPS,
    SEQUENCES,
    TRAJECTORIES,
)
from rllib_gtpo.engines.vllm import pack_state
from rllib_gtpo.engines.vllm.device import DeviceSender, Members
from rllib_gtpo.errors import GTPOError
from rllib_gtpo.ops.advantages import TurnCredit
from rllib_gtpo.ops.diagnostics import finish_diagnostics
from rllib_gtpo.ops.losses import (
    Objective,
    finish_metrics,
    merge_metrics,
    normaliser,
    objective_sum,
)
from rllib_gtpo.packing import (
    NOT_TRAINED,
    TokenBatch,
    TokenSequence,
    collate,
    empty_batch,
    micro_batches,
)
from rllib_gtpo.rl_module import ENTROPY, LOGPROBS
from rllib_gtpo.strategies import Strategy
from rllib_gtpo.types import Group, Trajectory

SUPERVISED = "supervised"  # the cold start's own optimizer, so that RL starts with a fresh state
POLICY = "policy"
MAX_BAD_STEPS = 10  # non-finite gradients in a row after which training stops
_NOTHING_TRAINED = ("loss", "mismatch/kl", "policy/entropy", "grad/norm", "grad/skipped", "tokens")
Output = dict[str, Tensor]


@dataclass(frozen=True)
class TrainedBatch:
    """What the last update trained on: kept for metrics, the record and the report."""

    groups: list[Group]
    trajectories: list[Trajectory]
    credit: TurnCredit


class GTPOLearner(TorchLearner):
    """Trains an LLMModule on whole groups."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.last_batch: TrainedBatch | None = None
        self._bad_steps = 0
        self._packed = False  # whether the model takes sequences without padding
        self._strategy: Strategy = self.config.build_strategy()
        self._step_metrics: tuple[str, ...] = (
            _NOTHING_TRAINED  # their names stay when there is nothing to train on
        )
        self._reference: Any = None
        self._sender: DeviceSender | None = None  # of weights to engines, if they go that way
        self._objective: Objective = self.config.build_objective()

    # RLlib's hooks.

    def build(self) -> None:
        """Builds as RLlib does, and seeds each learner's own generator."""
        device = get_device(self.config, self.config.num_gpus_per_learner)
        self._strategy.setup_process(self._rank, self._world, torch.device(device))
        super().build()
        self._gather_weights(self._unwrapped)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed + 1000 * self._rank)

    def _make_module(self) -> Any:
        """RLlib's, switched to packed batches and cut into shards before there are optimizers."""
        module = super()._make_module()
        self._packed = module[DEFAULT_MODULE_ID].pack()
        self._strategy.shard(module[DEFAULT_MODULE_ID])
        if self._strategy.sharded:
            module[DEFAULT_MODULE_ID].sharding = self._strategy
        return module

    def _make_modules_ddp_if_necessary(self) -> None:
        """Only if that is the strategy."""
        if self._strategy.name == "ddp":
            super()._make_modules_ddp_if_necessary()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One optimizer for RL, following `lr`, and one for the cold start, driven step by step."""
        parameters = self.get_parameters(self._module[module_id])
        optimizer = self.config.build_optimizer(parameters)
        self._strategy.prepare(self._module[module_id], optimizer)
        self.register_optimizer(
            module_id=module_id,
            optimizer_name=POLICY,
            optimizer=optimizer,
            params=parameters,
            lr_or_lr_schedule=config.lr,
        )
        if self._strategy.one_optimizer:
            return
        self.register_optimizer(
            module_id=module_id,
            optimizer_name=SUPERVISED,
            optimizer=torch.optim.AdamW(parameters, weight_decay=0.0),
            params=parameters,
        )

    def get_parameters(self, module: Any) -> Sequence[Any]:
        """Only what is trained."""
        return [p for p in module.parameters() if p.requires_grad]

    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        """RLlib's per-batch hook; the loss here needs the whole step, see `_policy_loss`."""
        raise GTPOError("GTPOLearner computes its loss in update(); override _policy_loss instead.")

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, plus random state and, if there is one, the reference model.

        Of a sharded model the first learner has the whole weights; see `save_shards` for the rest.
        """
        left_out = _as_list(not_components)
        if self._strategy.sharded:
            left_out.append(COMPONENT_OPTIMIZER)
        state: dict[str, Any] = super().get_state(components, not_components=left_out, **kwargs)
        if components is None:
            state["torch_rng"] = torch.get_rng_state()
            if self._reference is not None:
                state["reference"] = self._reference.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """See `get_state`; learners other than the first continue with a generator of their own."""
        super().set_state(state)
        self._gather_weights(self._unwrapped)
        if "torch_rng" in state:
            torch.set_rng_state(state["torch_rng"])
            if self._rank:
                torch.manual_seed(torch.initial_seed() + self._rank)
        if "reference" in state:
            self._make_reference().set_state(state["reference"])
            self._gather_weights(self._reference)

    def _get_optimizer_state(self) -> dict[str, Any]:
        """Without RLlib's way through numpy, which loses bfloat16 and integer steps."""
        return {
            name: {
                "module_id": self._optimizer_name_to_module[name],
                "state": self._strategy.optimizer_state(optimizer),
            }
            for name, optimizer in self._named_optimizers.items()
        }

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            if name in self._named_optimizers:
                optimizer = self._named_optimizers[name]
                self._strategy.load_optimizer_state(optimizer, saved["state"])
        self._keep_own_lr()

    def _keep_own_lr(self) -> None:
        if isinstance(self.config.lr, float):  # a schedule goes on by itself; a number may be new
            self._set_optimizer_lr(self.get_optimizer(DEFAULT_MODULE_ID, POLICY), self.config.lr)

    def save_shards(self) -> dict[str, bytes]:
        """This learner's files of a sharded optimizer state; every learner is asked at once."""
        with tempfile.TemporaryDirectory() as folder:
            self._strategy.save_shards(self._named_optimizers, Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def load_shards(self, files: dict[str, bytes]) -> None:
        """The files of all learners that saved; the weights are those of `set_state`."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._strategy.load_shards(self._unwrapped, self._named_optimizers, Path(folder))
        self._keep_own_lr()

    def _log_trainable_parameters(self) -> None:
        """Logged with each update instead: RLlib's one-off value is NaN in every later result."""

    # Reinforcement.

    def update(self, training_data: Any = None, *, timesteps: Any = None, **kwargs: Any) -> Any:
        """One update from whole groups: credit, then `epochs` x `mini_batches` optimizer steps."""
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        training_data.validate()
        training_data.solve_refs()
        self._weights_seq_no += 1
        batch = self._learner_connector(
            rl_module=self.module,
            batch={},
            episodes=training_data.episodes,
            shared_data={"all_reduce": self._sum},
            metrics=self.metrics,
        )
        self.last_batch = TrainedBatch(batch[GROUPS], batch[TRAJECTORIES], batch[CREDIT])
        if self._objective.kl_coeff and self._reference is None:
            self._make_reference()
        progress = kwargs.get("on_step") or (lambda done, total: None)
        self._log(self._credit_report(batch))
        self._log(self._train_on(self.last_batch, batch[SEQUENCES], progress))
        self._gather_weights(self._unwrapped)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def _credit_report(self, batch: dict[str, Any]) -> dict[str, float]:
        """What the step's credit looks like, over all learners."""
        sums = {name: self._sum(value) for name, value in batch[DIAGNOSTICS].items()}
        seconds = torch.tensor(batch[CREDIT_S], dtype=torch.float64, device=self._device)
        return {
            **finish_diagnostics(sums),
            "time/credit_s": float(self._sum(seconds)) / self._world,
        }

    def _train_on(
        self,
        trained: TrainedBatch,
        sequences: list[TokenSequence],
        on_step: Callable[[int, int], None],
    ) -> dict[str, float]:
        advantages = trained.credit.advantages.float()
        steps = self.config.epochs * self.config.mini_batches
        anchors = self._logprobs_of(sequences) if steps > 1 else None
        policy = self.get_optimizer(DEFAULT_MODULE_ID, POLICY)
        reports = []
        for step in range(steps):
            chosen = self._mini_batch(trained.groups, sequences, step % self.config.mini_batches)
            if self._max(len(chosen)):  # else there is nothing to train on at any learner
                loss_fn = self._policy_loss(advantages, anchors, [sequences[i] for i in chosen])
                reports.append(
                    self._step(sequences, chosen, loss_fn, policy, self.config.grad_clip)
                )
            on_step(step + 1, steps)
        if not reports:
            return dict.fromkeys(self._step_metrics, 0.0)
        report = {name: sum(r[name] for r in reports) / len(reports) for name in reports[0]}
        report["mismatch/kl"] = reports[0]["mismatch/kl"]  # before the first step of the update
        self._step_metrics = tuple(report)
        return report

    def _mini_batch(
        self, groups: list[Group], sequences: list[TokenSequence], part: int
    ) -> list[int]:
        """Indices of the trajectories (with tokens to train) of every `mini_batches`-th group.

        A group's id says which, so that the parts are the same for any number of learners.
        """
        owners = [group.id for group in groups for _ in group.trajectories]
        return [
            index
            for index, (owner, sequence) in enumerate(zip(owners, sequences, strict=True))
            if owner % self.config.mini_batches == part and sequence.token_ids
        ]

    def _policy_loss(
        self, advantages: Tensor, anchors: dict[int, Tensor] | None, sequences: list[TokenSequence]
    ) -> Callable[[TokenBatch, Output], tuple[Tensor, dict[str, Tensor]]]:
        """The clipped objective of one micro-batch, divided by the step's global normaliser."""
        rows = [turn for s in sequences for turn in s.turns if turn != NOT_TRAINED]
        owners = [i for i, s in enumerate(sequences) for t in s.turns if t != NOT_TRAINED]
        divisor = normaliser(
            self._objective,
            torch.tensor(rows, dtype=torch.long, device=self._device),
            torch.tensor(owners, dtype=torch.long, device=self._device),
            self._sum,
        )

        def loss(batch: TokenBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
            turns = batch.turns_N
            reference = None
            if self._objective.kl_coeff:
                assert self._reference is not None
                with torch.no_grad():
                    reference = self._strategy.reference_forward(
                        self._reference, {"tokens": batch}
                    )[LOGPROBS]
            total, metrics = objective_sum(
                self._objective,
                learner_logprobs=output[LOGPROBS],
                sampling_logprobs=batch.sampling_logprobs_N,
                advantages=advantages[turns],
                turn=turns,
                trajectory=batch.sequences_N,
                anchor_logprobs=None if anchors is None else _gather(anchors, batch),
                ref_logprobs=reference,
                entropy=output[ENTROPY],
            )
            return total / divisor.to(total.dtype), metrics

        return loss

    def _logprobs_of(self, sequences: list[TokenSequence]) -> dict[int, Tensor]:
        """Log-probabilities of the trained tokens of each sequence under the current weights."""
        found: dict[int, Tensor] = {}
        filled = [i for i, s in enumerate(sequences) if s.token_ids]
        lengths = [len(sequences[i].token_ids) for i in filled]
        parts = [[filled[i] for i in part] for part in self._micro_batches(lengths)]
        with torch.no_grad():
            for indices, batch in self._equally_many(sequences, parts):
                logprobs = self._forward(batch)[LOGPROBS]
                for index in indices:
                    found[index] = logprobs[batch.sequences_N == index]
        return found

    # Supervision.

    def supervised_step(self, sequences: list[TokenSequence], lr: float, grad_clip: float) -> float:
        """One step of next-token loss on demonstrations; every learner is given all and takes its
        share."""
        mine = list(range(self._rank, len(sequences), self._world))
        tokens = max(1, sum(s.num_trained for s in sequences))
        optimizer = self._supervised_optimizer
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=0.0)

        def loss(batch: TokenBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
            total = -output[LOGPROBS].sum()
            return total / tokens, {
                "tokens": torch.tensor(len(batch.targets_N), dtype=torch.float64)
            }

        return self._step(sequences, mine, loss, optimizer, grad_clip)["loss"]

    def supervised_loss(self, sequences: list[TokenSequence]) -> float:
        """Mean next-token loss on held-out demonstrations; nothing is trained."""
        mine = sequences[self._rank :: self._world]
        total = -sum(float(v.sum()) for v in self._logprobs_of(mine).values())
        sums = torch.tensor([total, sum(s.num_trained for s in mine)], dtype=torch.float64)
        total, tokens = self._sum(sums.to(self._device)).tolist()
        return total / max(tokens, 1.0)

    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return int(self._unwrapped.max_context)

    def publish_weights(self) -> tuple[int, Any] | None:
        """The version of the weights and a reference to them, packed for engines.

        From the first learner only: all have the same.
        """
        if self._rank:
            return None
        state = self._unwrapped.get_state(inference_only=True)
        return self._weights_seq_no, ray.put(pack_state(state))

    def send_weights(self, backend: str, pool: str, members: Members, workers: int) -> int:
        """Sends the weights from the learners' devices to the engines'; all learners take part.

        Returns their version.
        """
        if self._sender is None:
            self._sender = DeviceSender(backend, pool, self._unwrapped.model, self._rank)
        self._sender.send(members, workers, self._weights_seq_no)
        return self._weights_seq_no

    def end_supervision(self) -> None:
        """Frees the cold start's optimizer state, and counts the weights as new."""
        optimizer = self._supervised_optimizer
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["weight_decay"] = self.config.optimizer.get(
                "weight_decay", optimizer.defaults.get("weight_decay", 0.0)
            )
        self._keep_own_lr()
        self._gather_weights(self._unwrapped)
        self._weights_seq_no += 1

    @property
    def _supervised_optimizer(self) -> torch.optim.Optimizer:
        name = POLICY if self._strategy.one_optimizer else SUPERVISED
        optimizer: torch.optim.Optimizer = self.get_optimizer(DEFAULT_MODULE_ID, name)
        return optimizer

    # One optimizer step.

    def _step(
        self,
        sequences: list[TokenSequence],
        chosen: list[int],
        loss_fn: Callable[[TokenBatch, Output], tuple[Tensor, dict[str, Tensor]]],
        optimizer: torch.optim.Optimizer,
        grad_clip: float | None,
    ) -> dict[str, float]:
        """Accumulates the gradient of `loss_fn` over micro-batches and steps once."""
        self._strategy.zero_grad(optimizer)
        lengths = [len(sequences[i].token_ids) for i in chosen]
        parts = [[chosen[i] for i in part] for part in self._micro_batches(lengths)]
        metrics: list[dict[str, Tensor]] = []
        total_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        computed = 0
        module = self.module[DEFAULT_MODULE_ID]
        batches = self._equally_many(sequences, parts)
        for number, (_, batch) in enumerate(batches, start=1):
            with self._strategy.synchronised(module, last=number == len(batches)):
                loss, sums = loss_fn(batch, self._forward(batch))
                # Learners' gradients are averaged: undo the division.
                self._strategy.backward(loss * self._world)
            metrics.append(sums)
            total_loss += loss.detach()
            computed += batch.num_tokens
        report = finish_metrics(self._reduce_metrics(merge_metrics(metrics) if metrics else {}))
        report["loss"] = float(self._sum(total_loss))
        report["computed_tokens"] = float(
            self._sum(torch.tensor(float(computed), device=self._device))
        )
        report["grad/norm"] = self._apply_gradients(optimizer, grad_clip)
        report["grad/skipped"] = float(self._bad_steps > 0)
        return report

    def _apply_gradients(self, optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        """Clips by global norm and steps; a non-finite gradient leaves weights and moments
        untouched."""
        norm = self._strategy.step(optimizer, clip)
        if math.isfinite(norm):
            self._bad_steps = 0
            return norm
        self._bad_steps += 1
        if self._bad_steps >= MAX_BAD_STEPS:
            raise GTPOError(
                f"{MAX_BAD_STEPS} updates in a row had non-finite gradients; the weights are those "
                "before the first of them. Lower lr, check rewards, or use dtype='float32'."
            )
        return norm

    def _reduce_metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds up metric sums over learners; a learner without data takes part with zeros."""
        sums = {k: v.to(self._device) for k, v in sums.items()} or {
            "tokens": torch.zeros((), device=self._device)
        }
        if self._world == 1:
            return sums
        gathered: list[Any] = [None] * self._world
        dist.all_gather_object(gathered, {k: float(v) for k, v in sums.items()})
        return merge_metrics({k: torch.tensor(v) for k, v in part.items()} for part in gathered)

    def _log(self, report: dict[str, float]) -> None:
        parameters = self.get_parameters(self._unwrapped)
        report = {**report, NUM_TRAINABLE_PARAMETERS: float(sum(p.numel() for p in parameters))}
        for name, value in report.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, *name.split("/")), value, window=1)

    def _make_reference(self) -> Any:
        """A frozen copy of the module as it is now: the policy that KL is measured to."""

        def build() -> Any:
            module = self._module_spec.build()[DEFAULT_MODULE_ID].to(self._device)
            if self._packed:
                module.pack()
            return module

        self._reference = self._strategy.make_reference(self._unwrapped, build)
        self._reference.requires_grad_(False)
        self._gather_weights(self._reference)
        return self._reference

    def _equally_many(
        self, sequences: list[TokenSequence], parts: list[list[int]]
    ) -> list[tuple[list[int], TokenBatch]]:
        """The parts as micro-batches, and empty ones up to the most that any learner has.

        Every learner runs equally many passes, since each of them may hold a collective.
        """
        batches = [(part, collate(sequences, part, packed=self._packed)) for part in parts]
        missing = self._max(len(parts)) - len(parts)
        batches += [([], empty_batch(packed=self._packed)) for _ in range(missing)]
        return [(part, batch.to(self._device)) for part, batch in batches]

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        return micro_batches(lengths, self.config.token_budget, packed=self._packed)

    # Who else is there.

    @property
    def _unwrapped(self) -> Any:
        return self.module[DEFAULT_MODULE_ID].unwrapped()

    @property
    def _world(self) -> int:
        return dist.get_world_size() if self.distributed and dist.is_initialized() else 1

    @property
    def _rank(self) -> int:
        return dist.get_rank() if self.distributed and dist.is_initialized() else 0

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over learners."""
        if self._world > 1:
            dist.all_reduce(tensor)
        return tensor

    def _max(self, count: int) -> int:
        if self._world == 1:
            return count
        tensor = torch.tensor(count, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def _forward(self, batch: TokenBatch) -> Output:
        return self._strategy.forward(self.module[DEFAULT_MODULE_ID], {"tokens": batch})

    def _gather_weights(self, module: Any) -> None:
        """For `get_state`, which is asked of the first learner alone."""
        if module.sharding is not None:
            module.whole = self._strategy.full_weights(module) or {}


def _gather(anchors: dict[int, Tensor], batch: TokenBatch) -> Tensor:
    """The anchors of a batch's trained tokens, in its order."""
    order = torch.unique_consecutive(batch.sequences_N).tolist()
    if not order:
        return batch.sampling_logprobs_N
    return torch.cat([anchors[i] for i in order])


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
