"""Connector pieces between chat messages and tokens, on the rollout side.

They speak the columns below.  A custom piece (say, one that shortens tool output) goes in front of
them through RLlib's `env_runners(env_to_module_connector=..., module_to_env_connector=...)`.
"""

from __future__ import annotations

from typing import Any

from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns

from rllib_gtpo.chat import ChatCodec
from rllib_gtpo.types import Completion, Turn

PROMPT_IDS = "prompt_ids"  # env to module: ids that the newest observation adds to the context
COMPLETIONS = "completions"  # module to env: what the engine sampled
_ENDED_BY = "ended_by"  # in an episode's custom data: the last token of its newest turn


class ChatPiece(ConnectorV2):
    """A connector piece that knows the tokenizer and its template."""

    def __init__(self, *args: Any, codec: ChatCodec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.codec = codec


class MessagesToTokens(ChatPiece):
    """The newest observation of each episode -> the ids that it adds to the context."""

    def __call__(
        self, *, batch: dict[str, Any], episodes: list[Any], **kwargs: Any
    ) -> dict[str, Any]:
        batch[PROMPT_IDS] = [self._ids(episode) for episode in episodes]
        return batch

    def _ids(self, episode: Any) -> list[int]:
        observation = episode.get_observations(-1)
        if len(episode) == 0:
            return self.codec.prompt_ids(observation.messages, observation.tools)
        return self.codec.delta_ids(observation.messages, episode.custom_data.get(_ENDED_BY))


class TokensToTurns(ChatPiece):
    """The completion of each episode -> a Turn: text, thinking, content and parsed tool calls."""

    def __call__(
        self, *, batch: dict[str, Any], episodes: list[Any], **kwargs: Any
    ) -> dict[str, Any]:
        batch[Columns.ACTIONS] = [
            self._turn(episode, prompt_ids, completion)
            for episode, prompt_ids, completion in zip(
                episodes, batch[PROMPT_IDS], batch[COMPLETIONS], strict=True
            )
        ]
        return batch

    def _turn(self, episode: Any, prompt_ids: list[int], completion: Completion) -> Turn:
        text = self.codec.decode(completion.token_ids)
        tools = episode.get_observations(0).tools
        parsed = self.codec.parse(completion.token_ids, tools, prompt_ids)
        episode.custom_data[_ENDED_BY] = completion.token_ids[-1] if completion.token_ids else None
        return Turn(
            index=len(episode),
            prompt_ids=prompt_ids,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            finish=completion.finish,
            weights_version=completion.weights_version,
            last_version=completion.last_version,
            text=text,
            content=parsed.content,
            thinking=parsed.thinking,
            calls=parsed.calls,
        )
