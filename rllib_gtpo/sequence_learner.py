"""A Learner of token sequences: exact gradient accumulation, one optimizer step at a time.

RLlib's own update loop knows neither accumulation nor ragged token batches.  However many learners
there are and however their shards are cut into micro-batches, the gradient is that of one loss over
the global batch: every normaliser is summed over learners before it divides.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.rllib.core import DEFAULT_MODULE_ID
from torch import Tensor

from rllib_gtpo.errors import GTPOError
from rllib_gtpo.lora import adapter_off, dropout_on
from rllib_gtpo.ops.losses import finish_metrics, merge_metrics
from rllib_gtpo.packing import TokenBatch, TokenSequence, collate, empty_batch, micro_batches
from rllib_gtpo.rl_module import LOGPROBS
from rllib_gtpo.strategy_learner import POLICY, SUPERVISED, StrategyLearner

logger = logging.getLogger(__name__)
MAX_BAD_STEPS = 10  # non-finite gradients in a row after which training stops
Output = dict[str, Tensor]
Indices = list[int]
LossFunction = Callable[[TokenBatch, Output], tuple[Tensor, dict[str, Tensor]]]
"""Of a micro-batch and the module's output: its share of the loss, and sums for metrics."""


class SequenceLearner(StrategyLearner):
    """Takes optimizer steps on token sequences, and trains on demonstrations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._bad_steps = 0
        self._over_budget_before = False

    # One optimizer step.

    def _step(
        self,
        sequences: list[TokenSequence],
        chosen: list[int],
        loss_fn: LossFunction,
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

    def _reference_logprobs_of(self, sequences: list[TokenSequence]) -> dict[int, Tensor]:
        """Under the policy that KL is measured to: a model that is kept as it was, or with LoRA
        this one without its adapter."""
        if self._lora:
            with adapter_off(self._unwrapped.model):
                return self._logprobs_of(sequences)
        reference = self._reference or self._make_reference()
        return self._logprobs_of(
            sequences,
            lambda batch: self._strategy.reference_forward(reference, {"tokens": batch}),
        )

    def _logprobs_of(
        self,
        sequences: list[TokenSequence],
        forward: Callable[[TokenBatch], Output] | None = None,
    ) -> dict[int, Tensor]:
        """Log-probabilities of the trained tokens of each sequence under the current weights.

        forward: Of another model.
        """
        found: dict[int, Tensor] = {}
        filled = [i for i, s in enumerate(sequences) if s.token_ids]
        lengths = [len(sequences[i].token_ids) for i in filled]
        parts = [[filled[i] for i in part] for part in self._micro_batches(lengths)]
        with torch.no_grad():
            for indices, batch in self._equally_many(sequences, parts):
                logprobs = (forward or self._forward)(batch)[LOGPROBS]
                for index in indices:
                    found[index] = logprobs[batch.sequences_N == index]
        return found

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

    def _over_budget(self, sequences: list[TokenSequence]) -> float:
        """How many sequences of all learners are longer than a micro-batch should be."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        over = sum(length > self.config.token_budget for length in lengths)
        if over and not self._over_budget_before:
            self._over_budget_before = True
            logger.warning(
                "%d trajectories are longer than token_budget=%d (the longest has %d tokens); each "
                "gets a micro-batch of its own. If that does not fit into memory, set "
                "rollouts(max_tokens=%d) or learners(activation_checkpointing=True); else raise "
                "token_budget.",
                over,
                self.config.token_budget,
                max(lengths),
                self.config.token_budget,
            )
        return float(self._sum(torch.tensor(float(over), device=self._device)))

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        return micro_batches(lengths, self.config.token_budget, packed=self._packed)

    def _forward(self, batch: TokenBatch) -> Output:
        return self._strategy.forward(self.module[DEFAULT_MODULE_ID], {"tokens": batch})

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

        with dropout_on(self._unwrapped.model) if self._lora else contextlib.nullcontext():
            return self._step(sequences, mine, loss, optimizer, grad_clip)["loss"]

    def supervised_loss(self, sequences: list[TokenSequence]) -> float:
        """Mean next-token loss on held-out demonstrations; nothing is trained."""
        mine = sequences[self._rank :: self._world]
        total = -sum(float(v.sum()) for v in self._logprobs_of(mine).values())
        sums = torch.tensor([total, sum(s.num_trained for s in mine)], dtype=torch.float64)
        total, tokens = self._sum(sums.to(self._device)).tolist()
        return total / max(tokens, 1.0)

    def keep_best_weights(self) -> None:
        """Keeps the present weights, at the first learner, in place of those kept before."""
        self._gather_weights(self._unwrapped)
        if self._rank == 0:
            self.best_weights = self._unwrapped.get_state()

    def publish_best_weights(self) -> Any:
        """A reference to them, of the first learner; nothing keeps them here any longer."""
        kept, self.best_weights = self.best_weights, None
        return None if kept is None else ray.put(kept)

    def take_weights(self, box: list[Any]) -> None:
        """Takes whole weights; the reference to them is in a list, or ray would resolve it."""
        self._unwrapped.set_state(ray.get(box[0]))

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
