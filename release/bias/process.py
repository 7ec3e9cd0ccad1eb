"""Small decision processes as data, a tabular softmax policy, and exact expectations under it.

Shape suffixes: `_D` state-action pairs (the policy's logits).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """With probability `chance`, an action earns these rewards and leads to node `to`, or ends.

    `code` is what the action wrote; only shaping reads it.
    """

    chance: float
    to: str | None = None
    accuracy: float = 0.0
    format: float = 0.0
    code: str = ""

    @property
    def total(self) -> float:
        """The reward of the turn."""
        return self.accuracy + self.format


@dataclass(frozen=True)
class Node:
    """A situation.  Nodes that show the policy the same `state` share its logits."""

    state: str
    actions: Mapping[str, tuple[Branch, ...]]


@dataclass(frozen=True)
class Process:
    """Nodes without cycles.  `prompts` gives each first node's share of the groups.

    Example: one turn, two actions, right with probability 0.9 and 0.2.
        Process("coin", "", {"go": Node("go", {"a": answer(0.9), "b": answer(0.2)})}, {"go": 1.0})
    """

    name: str
    isolates: str
    nodes: Mapping[str, Node]
    prompts: Mapping[str, float]

    def __post_init__(self) -> None:
        if abs(sum(self.prompts.values()) - 1.0) > 1e-12:
            raise ValueError(f"{self.name}: the shares of the prompts must sum to 1")
        for name, node in self.nodes.items():
            if list(node.actions) != self.actions[node.state]:
                raise ValueError(
                    f"{self.name}: {name!r} shows state {node.state!r}, so it must have the "
                    f"actions {self.actions[node.state]}"
                )
            for action, branches in node.actions.items():
                if abs(sum(b.chance for b in branches) - 1.0) > 1e-12:
                    raise ValueError(f"{self.name}: chances of {name!r}, {action!r} must sum to 1")

    @cached_property
    def actions(self) -> dict[str, list[str]]:
        """The actions of every state, in order of appearance."""
        found: dict[str, list[str]] = {}
        for node in self.nodes.values():
            found.setdefault(node.state, list(node.actions))
        return found

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """Which logit belongs to (state, action)."""
        pairs = [(state, action) for state, names in self.actions.items() for action in names]
        return {pair: index for index, pair in enumerate(pairs)}

    @cached_property
    def state_D(self) -> Tensor:
        """The number of the state that each logit belongs to."""
        sizes = torch.tensor([len(names) for names in self.actions.values()])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def uniform(self) -> Tensor:
        """Logits of the uniform policy."""
        return torch.zeros(len(self.index), dtype=torch.float64)

    def log_policy_D(self, logits_D: Tensor) -> Tensor:
        """log pi(action | state) of every pair; differentiable."""
        sizes = [len(names) for names in self.actions.values()]
        return torch.cat([part.log_softmax(0) for part in logits_D.split(sizes)])


Reward = Callable[[Branch], float]


def total(branch: Branch) -> float:
    """The reward that training sums."""
    return branch.total


def accuracy(branch: Branch) -> float:
    """What a user wants, whatever the reward says."""
    return branch.accuracy


def expected(
    process: Process, logits_D: Tensor, reward: Reward = total, gamma: float = 1.0
) -> Tensor:
    """Exact expected discounted reward of a trajectory, by backward recursion; differentiable."""
    policy_D = process.log_policy_D(logits_D).exp()
    values: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name not in values:
            node = process.nodes[name]
            worth = []
            for branches in node.actions.values():
                now = sum(b.chance * reward(b) for b in branches)
                later = [gamma * b.chance * value(b.to) for b in branches if b.to is not None]
                worth.append(sum(later, start=logits_D.new_tensor(now)))
            first = process.index[node.state, next(iter(node.actions))]
            values[name] = policy_D[first : first + len(worth)] @ torch.stack(worth)
        return values[name]

    return torch.stack([share * value(name) for name, share in process.prompts.items()]).sum()


def gradient(
    process: Process, logits_D: Tensor, reward: Reward = total, gamma: float = 1.0
) -> Tensor:
    """Exact gradient of `expected`."""
    leaf_D = logits_D.clone().requires_grad_()
    return torch.autograd.grad(expected(process, leaf_D, reward, gamma), leaf_D)[0]


def best(process: Process) -> float:
    """Expected total reward of the best deterministic policy, found by trying all."""
    pairs = [[(state, action) for action in names] for state, names in process.actions.items()]
    reached = []
    for choice in itertools.product(*pairs):
        logits_D = process.uniform()
        logits_D[[process.index[pair] for pair in choice]] = 1000.0
        reached.append(float(expected(process, logits_D)))
    return max(reached)


def trained(process: Process, progress: float) -> Tensor:
    """Logits after exact gradient ascent, from uniform, of `progress` of the way to `best`."""
    logits_D = process.uniform()
    start = float(expected(process, logits_D))
    goal = start + progress * (best(process) - start)
    for _ in range(2000):
        if float(expected(process, logits_D)) >= goal:
            return logits_D
        slope_D = gradient(process, logits_D)
        logits_D = logits_D + 0.1 * slope_D / slope_D.norm()
    raise RuntimeError(f"{process.name}: gradient ascent does not reach {goal:.3f}")
