"""Trajectories of a process as rows of tensors: all of them, or a sample.

Shape suffixes: `_M` paths, `_R` rows (the turns of all paths; a path's turns are adjacent and in
order), `_B` branches of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bias.process import Branch, Process


@dataclass(frozen=True)
class Paths:
    """Trajectories as rows.  `chance_M` is the environment's part of their probability."""

    pair_R: Tensor
    accuracy_R: Tensor
    format_R: Tensor
    length_M: Tensor
    prompt_M: Tensor
    chance_M: Tensor
    code_M: tuple[str, ...] = ()

    @cached_property
    def start_M(self) -> Tensor:
        """First row of each path."""
        return self.length_M.cumsum(0) - self.length_M

    @cached_property
    def path_R(self) -> Tensor:
        """The path that each row belongs to."""
        return torch.arange(len(self.length_M)).repeat_interleave(self.length_M)

    def per_path(self, values_R: Tensor) -> Tensor:
        """Sum over each path's rows."""
        return values_R.new_zeros(len(self.length_M)).index_add(0, self.path_R, values_R)

    def probability_M(self, process: Process, logits_D: Tensor) -> Tensor:
        """Probability of each path, given its prompt; differentiable."""
        log_R = process.log_policy_D(logits_D)[self.pair_R]
        return self.chance_M * self.per_path(log_R).exp()


def walk(process: Process, name: str) -> Iterator[tuple[float, list[tuple[int, Branch]]]]:
    """Every way through the process from a node: chance, and (pair, branch) of each turn."""
    node = process.nodes[name]
    for action, branches in node.actions.items():
        for branch in branches:
            step = (process.index[node.state, action], branch)
            if branch.to is None:
                yield branch.chance, [step]
            else:
                for chance, steps in walk(process, branch.to):
                    yield branch.chance * chance, [step, *steps]


def enumerate_paths(process: Process) -> Paths:
    """All trajectories of a process."""
    found = [
        (prompt, chance, steps)
        for prompt, name in enumerate(process.prompts)
        for chance, steps in walk(process, name)
    ]
    rows = [step for _, _, steps in found for step in steps]

    def double(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Paths(
        torch.tensor([pair for pair, _ in rows]),
        double([branch.accuracy for _, branch in rows]),
        double([branch.format for _, branch in rows]),
        torch.tensor([len(steps) for _, _, steps in found]),
        torch.tensor([prompt for prompt, _, _ in found]),
        double([chance for _, chance, _ in found]),
        tuple("\n".join(b.code for _, b in steps if b.code) for _, _, steps in found),
    )


def sample_paths(process: Process, logits_D: Tensor, count: int, seed: int) -> Paths:
    """`count` independent trajectories, where there are too many to enumerate; one prompt only."""
    (first,) = process.prompts
    names = list(process.nodes)
    policy_D = process.log_policy_D(logits_D).exp().tolist()
    upper, pair, to, accuracy, format_ = [], [], [], [], []  # of each (node, action, branch)
    for number, node in enumerate(process.nodes.values()):
        below = 0.0
        for action, branches in node.actions.items():
            for b in branches:
                pair.append(process.index[node.state, action])
                below += policy_D[pair[-1]] * b.chance
                upper.append(number + min(below, 1.0))
                to.append(-1 if b.to is None else names.index(b.to))
                accuracy.append(b.accuracy)
                format_.append(b.format)
        upper[-1] = number + 1.0
    upper_B, to_B = torch.tensor(upper, dtype=torch.float64), torch.tensor(to)

    generator = torch.Generator().manual_seed(seed)
    alive_M, at_M = torch.arange(count), torch.full((count,), names.index(first))
    owners, branches = [], []
    while len(alive_M):
        draw_M = torch.rand(len(alive_M), generator=generator, dtype=torch.float64)
        branch_M = torch.searchsorted(upper_B, at_M + draw_M, right=True)
        owners.append(alive_M)
        branches.append(branch_M)
        goes_on_M = to_B[branch_M] >= 0
        alive_M, at_M = alive_M[goes_on_M], to_B[branch_M][goes_on_M]
    owner_R = torch.cat(owners)
    branch_R = torch.cat(branches)[owner_R.argsort(stable=True)]
    return Paths(
        torch.tensor(pair)[branch_R],
        torch.tensor(accuracy, dtype=torch.float64)[branch_R],
        torch.tensor(format_, dtype=torch.float64)[branch_R],
        torch.bincount(owner_R, minlength=count),
        torch.zeros(count, dtype=torch.long),
        torch.ones(count, dtype=torch.float64),
    )
