"""The RLModule: a causal language model that gives log-probabilities of trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.language_model import switch_to_packed, trained_logprobs
from rllib_gtpo.lora import BASE_MARK, LoRASettings, add_adapter, base_mark, check_state_kind
from rllib_gtpo.models import load_config, load_model, max_positions
from rllib_gtpo.strategies.base import Strategy, named_tensors

LOGPROBS = "logprobs"
ENTROPY = "entropy"


class LLMModule(TorchRLModule):
    """A Hugging Face causal LM.  `model_config`: model, dtype, seed, temperature, lora.

    With LoRA its state is the adapter alone, and a mark of the model that this belongs to.

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
        self.adapter_names: frozenset[str] | None = None  # of the state, with LoRA
        self.peft_config: Any = None
        if (lora := LoRASettings.of(settings.get("lora"))) is not None:
            self.register_buffer(BASE_MARK, base_mark(self.model))
            self.peft_config = add_adapter(self.model, lora, settings["seed"])
            trained = {n for n, p in self.named_parameters() if p.requires_grad}
            self.adapter_names = frozenset({*trained, BASE_MARK})
        self.synced_bytes = 0  # of the last state that was given to rollout workers
        self.temperature: float = settings["temperature"]
        self.sharding: Strategy | None = None  # of a learner that holds only a part
        self.whole: dict[str, Tensor] = {}  # then: the weights as they were last gathered
        self.masters: dict[Any, Tensor] = {}  # float32 weights of parameters that are bfloat16
        self.engine_dtype: torch.dtype | None = None  # of what engines get, if it is not its own

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return max_positions(self.model.config)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        logprobs_N, entropy_N = trained_logprobs(
            self.model, batch["tokens"], temperature=self.temperature or 1.0
        )
        assert entropy_N is not None
        return {LOGPROBS: logprobs_N, ENTROPY: entropy_N}

    def pack(self) -> bool:
        """Takes packed batches from now on, if the model can; says whether it can."""
        return switch_to_packed(self.model)

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
        state = self.whole
        if self.sharding is None:
            state = {
                name: self.masters.get(value, value).detach().to("cpu", copy=True)
                for name, value in named_tensors(self)
            }
        if inference_only:
            if self.engine_dtype is not None:
                state = {
                    name: value.to(self.engine_dtype) if value.is_floating_point() else value
                    for name, value in state.items()
                }
            self.synced_bytes = sum(value.nbytes for value in state.values())
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Loads a state of `get_state`; refuses one of another architecture, or base of LoRA."""
        check_state_kind(state, getattr(self, BASE_MARK, None), self.adapter_names or ())
        if self.sharding is not None:
            self.sharding.load_weights(self, state)
            return
        own = self.state_dict(keep_vars=True)
        self.check_state(state, {name: tuple(value.shape) for name, value in own.items()})
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
                if own[name] in self.masters:
                    self.masters[own[name]].copy_(value)

    @staticmethod
    def check_state(state: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError for weights that do not go into tensors of these shapes."""
        for name, value in state.items():
            if name in shapes and shapes[name] == tuple(value.shape):
                continue
            problem = (
                f"has shape {tuple(value.shape)}, here {shapes[name]}"
                if name in shapes
                else "does not exist here"
            )
            raise ConfigError(
                f"The weights belong to another model: {name!r} {problem}. Use the model= and "
                "lora= settings that the weights were made with."
            )


class RemoteModule(TorchRLModule):
    """Stands in for an LLMModule where engines elsewhere hold the model: it has no weights."""

    framework = "torch"

    def setup(self) -> None:
        """Reads the model's config only."""
        settings = self.model_config
        self.model_settings = load_config(settings["model"], settings["tokenizer"])

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model_settings.get_text_config().vocab_size)

    @property
    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return max_positions(self.model_settings)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Nothing: learners hold the weights, and engines a copy."""
        return {}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to set."""
