"""TRL's loss on the same groups: GRPOTrainer's own `_compute_loss`, and its gradient.

The batch is the one that its trainer makes: prompts padded on the left to the longest, completions
on the right, tool output in them masked out, and the whole batch cut into micro-batches.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from release.learner.batches import advantages_of, trajectories_of
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import Group


class TRLLoss:
    """Forward, loss and backward of all micro-batches; no optimizer and no credit."""

    def __init__(self, model: Any, groups: Sequence[Group], rows: int, scratch: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig as TRLConfig
        from trl import GRPOTrainer

        self.model = model
        trajectories = trajectories_of(groups)
        batch = padded(groups)
        count = len(trajectories)
        self._micro_batches = [
            {name: value[start : start + rows] for name, value in batch.items()}
            for start in range(0, count, rows)
        ]
        trained = (batch["completion_mask"] * batch["tool_mask"]).sum()
        for micro_batch in self._micro_batches:
            micro_batch["num_items_in_batch"] = trained
        settings = TRLConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=count // rows,
            num_generations=count // len(groups),
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        )
        self._trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "0"}] * count),
            processing_class=build_tokenizer(),
        )
        self._trainer.current_gradient_accumulation_steps = count // rows
        model.train()

    @property
    def positions(self) -> int:
        """What goes through the model."""
        batches = self._micro_batches
        return sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in batches)

    def update(self) -> float:
        """The gradient of the whole batch; its norm."""
        self.model.zero_grad()
        for batch in self._micro_batches:
            self._trainer._compute_loss(self.model, batch).backward()
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))


def padded(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """The batch as TRL's trainer holds it; every token of a turn has the turn's advantage."""
    advantages = iter(advantages_of(groups).tolist())
    columns: dict[str, list[torch.Tensor]] = {}
    for trajectory in trajectories_of(groups):
        first = trajectory.turns[0].prompt_ids
        ids: list[int] = []
        sampled: list[int] = []
        signal: list[float] = []
        for turn in trajectory.turns:
            context = turn.prompt_ids if turn.index else []
            new = len(turn.token_ids)
            ids += context + turn.token_ids
            sampled += [0] * len(context) + [1] * new
            signal += [0.0] * len(context) + [next(advantages)] * new
        row = {
            "prompt_ids": torch.tensor(first),
            "prompt_mask": torch.ones(len(first), dtype=torch.long),
            "completion_ids": torch.tensor(ids),
            "completion_mask": torch.ones(len(ids), dtype=torch.long),
            "tool_mask": torch.tensor(sampled),
            "advantages": torch.tensor(signal),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {
        name: pad_sequence(
            values, batch_first=True, padding_side="left" if name.startswith("prompt") else "right"
        )
        for name, values in columns.items()
    }
