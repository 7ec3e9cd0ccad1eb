"""The Learner: group-normalised turn credit and the clipped objective, over whole groups.

`update` replaces RLlib's as a whole; its hooks, optimizer registry, schedules, metrics and state
are RLlib's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
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
from rllib_gtpo.errors import GTPOError
from rllib_gtpo.ops.advantages import TurnCredit
from rllib_gtpo.ops.diagnostics import finish_diagnostics
from rllib_gtpo.ops.losses import Objective, normaliser, objective_sum
from rllib_gtpo.packing import NOT_TRAINED, TokenBatch, TokenSequence
from rllib_gtpo.record.credit import LearnedCredit, TokenTrace
from rllib_gtpo.rl_module import ENTROPY, LOGPROBS
from rllib_gtpo.sequence_learner import Indices, LossFunction, Output, SequenceLearner
from rllib_gtpo.strategy_learner import POLICY
from rllib_gtpo.types import Group, Trajectory

_NOTHING_TRAINED = ("loss", "mismatch/kl", "policy/entropy", "grad/norm", "grad/skipped", "tokens")


@dataclass(frozen=True)
class TrainedBatch:
    """What the last update trained on: kept for metrics, the record and the report."""

    groups: list[Group]
    trajectories: list[Trajectory]
    credit: TurnCredit


class GTPOLearner(SequenceLearner):
    """Trains an LLMModule on whole groups."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.last_batch: TrainedBatch | None = None
        self._trace: TokenTrace | None = None  # of the last update, if it is to be recorded
        self._objective: Objective = self.config.build_objective()
        self._step_metrics: tuple[str, ...] = (
            _NOTHING_TRAINED  # their names stay when there is nothing to train on
        )

    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        """RLlib's per-batch hook; the loss here needs the whole step, see `_policy_loss`."""
        raise GTPOError("GTPOLearner computes its loss in update(); override _policy_loss instead.")

    def update(self, training_data: Any = None, *, timesteps: Any = None, **kwargs: Any) -> Any:
        """One update from whole groups: credit, then `epochs` x `mini_batches` optimizer steps."""
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        self._follow_lr_schedule()
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
        self._trace = TokenTrace() if self.config.record_settings.share else None
        progress = kwargs.get("on_step") or (lambda done, total: None)
        self._log(self._credit_report(batch))
        lr = self.get_optimizer(DEFAULT_MODULE_ID, POLICY).param_groups[0]["lr"]
        over_budget = self._over_budget(batch[SEQUENCES])
        self._log({"lr": float(lr), "packing/over_budget": over_budget})
        self._log(self._train_on(self.last_batch, batch[SEQUENCES], progress))
        self._gather_weights(self._unwrapped)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return self.metrics.reduce()

    def learned_credit(self, group_ids: Sequence[int]) -> list[LearnedCredit]:
        """What the last update did with the trajectories of some groups, to be recorded."""
        if self.last_batch is None or self._trace is None:
            return []
        credit, trajectories = self.last_batch.credit, self.last_batch.trajectories
        return self._trace.learned_credit(self._objective, credit, trajectories, set(group_ids))

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
        references = self._reference_logprobs_of(sequences) if self._objective.kl_coeff else None
        policy = self.get_optimizer(DEFAULT_MODULE_ID, POLICY)
        reports = []
        parts = self._mini_batches(trained, sequences)
        for step in range(steps):
            chosen = parts[step % len(parts)]
            if self._max(len(chosen)):  # else there is nothing to train on at any learner
                loss_fn = self._policy_loss(
                    advantages, anchors, references, [sequences[i] for i in chosen]
                )
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

    def _mini_batches(self, trained: TrainedBatch, sequences: list[TokenSequence]) -> list[Indices]:
        """Indices of the trajectories (with tokens to train) of every `mini_batches`-th group.

        Counted over the groups of all learners that have such, by id: the parts are equally large,
        and the same for any number of learners.
        """
        owners = [group.id for group in trained.groups for _ in group.trajectories]
        filled = [index for index, sequence in enumerate(sequences) if sequence.token_ids]
        everywhere = sorted(self._gathered({owners[index] for index in filled}))
        count = self.config.mini_batches
        part_of = {owner: place % count for place, owner in enumerate(everywhere)}
        return [[i for i in filled if part_of[owners[i]] == part] for part in range(count)]

    def _policy_loss(
        self,
        advantages: Tensor,
        anchors: dict[int, Tensor] | None,
        references: dict[int, Tensor] | None,
        sequences: list[TokenSequence],
    ) -> LossFunction:
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
            anchor = None if anchors is None else _gather(anchors, batch)
            if self._trace is not None:
                self._trace.add(batch, output[LOGPROBS], anchor)
            total, metrics = objective_sum(
                self._objective,
                learner_logprobs=output[LOGPROBS],
                sampling_logprobs=batch.sampling_logprobs_N,
                advantages=advantages[turns],
                turn=turns,
                trajectory=batch.sequences_N,
                anchor_logprobs=anchor,
                ref_logprobs=None if references is None else _gather(references, batch),
                entropy=output[ENTROPY],
            )
            return total / divisor.to(total.dtype), metrics

        return loss

    def _log(self, report: dict[str, float]) -> None:
        parameters = self.get_parameters(self._unwrapped)
        report = {**report, NUM_TRAINABLE_PARAMETERS: float(sum(p.numel() for p in parameters))}
        for name, value in report.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, *name.split("/")), value, window=1)


def _gather(logprobs: dict[int, Tensor], batch: TokenBatch) -> Tensor:
    """Those of a batch's trained tokens, in its order."""
    order = torch.unique_consecutive(batch.sequences_N).tolist()
    if not order:
        return batch.sampling_logprobs_N
    return torch.cat([logprobs[i] for i in order])
