"""One whole update of a model on the same groups: by the Learner, and by the tightest plain loop.

A side is made once and its `update()` is called again and again.  What a plain loop could do before
it starts is done when it is made: its packed batches are on the device and its advantages known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from release.learner.batches import GAMMA, advantages_of, trajectories_of
from rllib_gtpo.language_model import hidden_states, switch_to_packed, trained_logprobs
from rllib_gtpo.layers import checkpoint_activations
from rllib_gtpo.models import load_model
from rllib_gtpo.ops.losses import Objective, normaliser, objective_sum
from rllib_gtpo.packing import TokenBatch, collate, micro_batches, token_sequences
from rllib_gtpo.strategies import Strategy
from rllib_gtpo.types import Group

LR, GRAD_CLIP, SEED = 1e-5, 1.0, 0


class Side(Protocol):
    """One way to update; `model` is what it trains."""

    model: Any

    def update(self) -> float:
        """One update; the gradient's norm before clipping."""


def make_model(settings: dict[str, Any], device: str, dtype: str, checkpointing: bool) -> Any:
    """A random model that takes packed rows."""
    with torch.device(device):
        model = load_model(settings, dtype=dtype, seed=SEED)
    if not switch_to_packed(model):
        raise RuntimeError("this model does not take packed rows")
    if checkpointing:
        checkpoint_activations(model)
    return model


def packed_batches(groups: Sequence[Group], budget: int, device: Any) -> list[TokenBatch]:
    """The micro-batches that the Learner makes of these groups."""
    sequences = token_sequences(trajectories_of(groups))
    lengths = [len(s.token_ids) for s in sequences]
    parts = micro_batches(lengths, budget, packed=True)
    return [collate(sequences, part, packed=True).to(device) for part in parts]


class Plain:
    """The tightest loop: the same packed rows and attention, all logits of the trained positions,
    and nothing that is not needed for the new weights."""

    def __init__(self, model: Any, groups: Sequence[Group], budget: int) -> None:
        self.model = model
        device = model.device
        advantages = advantages_of(groups).to(device)
        self._batches = packed_batches(groups, budget, device)
        self._advantages = [advantages[batch.turns_N] for batch in self._batches]
        self._tokens = sum(len(batch.targets_N) for batch in self._batches)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LR, weight_decay=0.0, fused=device.type == "cuda"
        )

    def update(self) -> float:
        """See Side."""
        head, clip = self.model.get_output_embeddings(), Objective()
        for batch, advantages in zip(self._batches, self._advantages, strict=True):
            hidden = hidden_states(self.model, batch).flatten(0, 1)[batch.positions_N]
            logprobs = -torch.nn.functional.cross_entropy(
                head(hidden).float(), batch.targets_N, reduction="none"
            )
            ratio = (logprobs - logprobs.detach()).exp()
            clipped = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
            loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / self._tokens
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


class Parts:
    """What the Learner computes, without RLlib around it and without float32 copies of weights."""

    def __init__(self, model: Any, groups: Sequence[Group], budget: int) -> None:
        self.model = model
        self._groups, self._budget, self._objective = groups, budget, Objective()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            parameters, lr=LR, weight_decay=0.0, fused=model.device.type == "cuda"
        )
        self._strategy = Strategy()

    def update(self) -> float:
        """See Side."""
        device = self.model.device
        advantages = advantages_of(self._groups).to(device)
        batches = packed_batches(self._groups, self._budget, device)
        turns = torch.cat([batch.turns_N for batch in batches])
        owners = torch.cat([batch.sequences_N for batch in batches])
        divisor = normaliser(self._objective, turns, owners)
        self._strategy.zero_grad(self._optimizer)
        for batch in batches:
            logprobs, entropy = trained_logprobs(self.model, batch)
            total, _ = objective_sum(
                self._objective,
                learner_logprobs=logprobs,
                sampling_logprobs=batch.sampling_logprobs_N,
                advantages=advantages[batch.turns_N],
                turn=batch.turns_N,
                trajectory=batch.sequences_N,
                entropy=entropy,
            )
            self._strategy.backward(total / divisor.to(total.dtype))
        return self._strategy.step(self._optimizer, GRAD_CLIP)


class Learner:
    """GTPOLearner.update, from episodes to metrics."""

    def __init__(self, settings: dict[str, Any], groups: Sequence[Group], budget: int) -> None:
        from ray.rllib.core.learner.training_data import TrainingData
        from ray.rllib.env.single_agent_episode import SingleAgentEpisode

        from rllib_gtpo import GTPOConfig
        from rllib_gtpo.env import ChatSpace
        from rllib_gtpo.episodes import attach_trajectory
        from rllib_gtpo_envs import Calculator

        config = (
            GTPOConfig()
            .environment(Calculator)
            .language_model(model=settings)
            .training(lr=LR, gamma=GAMMA, grad_clip=GRAD_CLIP, token_budget=budget)
            .reporting(progress=False)
            .debugging(seed=SEED)
        )
        spaces = {"default_policy": (ChatSpace(), ChatSpace())}
        spec = config.get_multi_rl_module_spec(spaces=spaces)
        self.learner = config.build_learner_group(rl_module_spec=spec)._learner
        self.model = self.learner._unwrapped.model
        self._data = TrainingData
        self._episodes = []
        for trajectory in trajectories_of(groups):
            episode = SingleAgentEpisode(observation_space=ChatSpace(), action_space=ChatSpace())
            episode.add_env_reset(observation="")
            for turn in trajectory.turns:
                last = turn is trajectory.turns[-1]
                episode.add_env_step(observation="", action="", reward=0.0, terminated=last)
            attach_trajectory(episode, trajectory)
            self._episodes.append(episode)

    def update(self) -> float:
        """See Side."""
        report = self.learner.update(self._data(episodes=list(self._episodes)))
        norm = float(report["default_policy"]["grad"]["norm"].peek())
        assert math.isfinite(norm)
        return norm
