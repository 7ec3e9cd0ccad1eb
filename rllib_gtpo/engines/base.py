"""The one interface between rollouts and whatever generates tokens.

Tests script it, `hf.py` implements it in process, other engines live in actors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rllib_gtpo.types import Completion


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one completion.  `temperature=0` is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One turn to generate.

    trajectory: names the rollout; an engine may keep a cache under it until `release`.
    token_ids: the whole context so far, ending where generation starts.  It extends the previous
        request of the same trajectory (its context plus its sampled ids plus new ones).  The list
        is the trajectory's own and grows when the call has returned: an engine copies what it
        keeps, and changes nothing.
    key: the sampler's random stream is a function of this tuple alone, never of batch composition.
    """

    trajectory: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    key: tuple[int, ...]


class RolloutEngine(Protocol):
    """Generates completions for many trajectories at once."""

    max_context: int  # most tokens that a context and its completion may have together

    async def generate(self, request: Request) -> Completion:
        """Samples one completion; concurrent calls share forward passes.

        The log-probabilities are those of the sampled tokens under softmax(logits / temperature),
        before top-p truncation (greedy: temperature 1), in the model's vocabulary.
        """
        ...

    def release(self, trajectory: str) -> None:
        """Forgets a trajectory: it has ended.  Unknown names are fine."""
        ...

    def weights_updated(self, version: int) -> None:
        """The weights have changed: stamps completions with `version`, drops stale caches."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; pending calls fail with EngineError."""
        ...


def check_request(request: Request, max_context: int, vocab_size: int) -> None:
    """Raises ValueError, which says what to change, for a request that no engine can serve."""
    sampling, n = request.sampling, len(request.token_ids)
    if n == 0:
        raise ValueError("token_ids is empty: a request needs at least one token of context")
    if n >= max_context:
        raise ValueError(
            f"a context of {n} tokens leaves no room to generate: shorten it below "
            f"max_context={max_context}, or raise max_context"
        )
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens={sampling.max_tokens}: ask for at least one token")
    if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1):
        raise ValueError(f"{sampling}: temperature must be >= 0 and top_p in (0, 1]")
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        raise ValueError(
            f"token_ids reach outside the model's vocabulary of {vocab_size}: the "
            "tokenizer belongs to another model, or the embeddings were not resized"
        )
