"""The RLModule: a causal language model that gives log-probabilities of trained tokens."""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import load_model
from rllib_gtpo.ops.logprobs import selected_logprobs
from rllib_gtpo.packing import TokenBatch

LOGPROBS = "logprobs"
ENTROPY = "entropy"


class LLMModule(TorchRLModule):
    """A Hugging Face causal LM.  `model_config`: model, dtype, seed, temperature.

    The forward pass runs inside `_forward_train`, log-probabilities included, so that wrappers (DDP
    and sharding) see one call with a small result instead of logits of the whole vocabulary.
    """

    framework = "torch"

    def setup(self) -> None:
        """Loads or makes the model."""
        settings = self.model_config
        self.model = load_model(
            settings["model"],
            dtype=settings["dtype"],
            seed=settings["seed"],
            tokenizer=settings["tokenizer"],
        )
        self.temperature: float = settings["temperature"]

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        tokens: TokenBatch = batch["tokens"]
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        output = decoder(input_ids=tokens.input_ids_BT, use_cache=False)
        hidden_NH = output.last_hidden_state.flatten(0, 1)[tokens.positions_N]
        logprobs_N, entropy_N = selected_logprobs(
            hidden_NH,
            head.weight,
            tokens.targets_N,
            temperature=self.temperature or 1.0,
            bias=head.bias,
            with_entropy=True,
        )
        if not len(logprobs_N):  # keep the graph, so that every rank runs a backward pass
            logprobs_N = logprobs_N + output.last_hidden_state.sum() * 0.0
        assert entropy_N is not None
        return {LOGPROBS: logprobs_N, ENTROPY: entropy_N}

    def get_state(
        self,
        components: Any = None,
        *,
        not_components: Any = None,
        inference_only: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """CPU copies in their own dtype (RLlib's numpy detour cannot carry bfloat16); tied weights
        once."""
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in self.state_dict().items():
            if value.data_ptr() in seen and value.numel():
                continue
            seen.add(value.data_ptr())
            state[name] = value.detach().to("cpu", copy=True)
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Loads a state of `get_state`; refuses one of another architecture."""
        own = self.state_dict()
        wrong = [
            name
            for name, value in state.items()
            if name not in own or own[name].shape != value.shape
        ]
        if wrong:
            raise ConfigError(
                f"The weights belong to another model: {wrong[0]!r} "
                + (
                    f"has shape {tuple(state[wrong[0]].shape)}, here {tuple(own[wrong[0]].shape)}"
                    if wrong[0] in own
                    else "does not exist here"
                )
                + ". Use the model= setting that the weights were made with."
            )
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
