"""The RLModule: a causal language model that gives log-probabilities of trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from rllib_gtpo.attention import PACKED_ATTENTION, why_not_packed
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import load_config, load_model, max_positions
from rllib_gtpo.ops.logprobs import selected_logprobs
from rllib_gtpo.packing import NOT_TRAINED, TokenBatch, TokenSequence, collate
from rllib_gtpo.strategies.base import Strategy, named_tensors

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
        self.sharding: Strategy | None = None  # of a learner that holds only a part
        self.whole: dict[str, Tensor] = {}  # then: the weights as they were last gathered

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return max_positions(self.model.config)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        tokens: TokenBatch = batch["tokens"]
        head = self.model.get_output_embeddings()
        hidden_BTH = self._hidden(tokens)
        hidden_NH = hidden_BTH.flatten(0, 1)[tokens.positions_N]
        logprobs_N, entropy_N = selected_logprobs(
            hidden_NH,
            head.weight,
            tokens.targets_N,
            temperature=self.temperature or 1.0,
            bias=head.bias,
            with_entropy=True,
        )
        if not len(logprobs_N):  # keep the graph, so that every rank runs a backward pass
            logprobs_N = logprobs_N + hidden_BTH.sum() * 0.0
        assert entropy_N is not None
        return {LOGPROBS: logprobs_N, ENTROPY: entropy_N}

    def _hidden(self, tokens: TokenBatch) -> Tensor:
        """The decoder's last hidden states.  Never with a cache: with one, transformers takes a
        packed row for one sequence."""
        packed: dict[str, Any] = {}
        if tokens.lengths is not None:
            packed = {
                "position_ids": tokens.position_ids_BT,
                "packed_lengths": tokens.lengths,
                "packed_bounds": tokens.bounds,
            }
        decoder = self.model.get_decoder()
        hidden: Tensor = decoder(
            input_ids=tokens.input_ids_BT, use_cache=False, **packed
        ).last_hidden_state
        return hidden

    def pack(self) -> bool:
        """Takes packed batches from now on, if the model can; says whether it can.

        It can if its sequences, packed, are what each is alone.  That is tried, since nothing but
        its own code says whether a model hands the bounds on to its attention; a difference counts
        as none if it is small beside what one sequence that saw another would make.
        """
        model = self.model
        config = model.config.get_text_config(decoder=True)
        if not getattr(model, "_supports_attention_backend", False) or why_not_packed(config):
            return False
        vocabulary = self.vocab_size
        probes = [[(7 * i + n) % vocabulary for i in range(n)] for n in (6, 11, 11, 9)]
        sequences = [
            TokenSequence(ids, [NOT_TRAINED] * len(ids), [0.0] * len(ids)) for ids in probes
        ]
        own, training = model.config._attn_implementation, model.training
        model.eval()
        try:
            with torch.no_grad():
                row = collate(sequences, range(len(probes)), packed=True).to(model.device)
                alone = [self._hidden(collate([s], [0]).to(model.device))[0] for s in sequences]
                seeing = self._hidden(replace(row, lengths=None))[0]
                model.set_attn_implementation(PACKED_ATTENTION)
                error = (self._hidden(row)[0] - torch.cat(alone)).abs().max()
                leak = (seeing - torch.cat(alone)).abs().max()
            packs = bool(error < leak / 4)
        except (TypeError, ValueError, RuntimeError):
            packs = False
        finally:
            model.train(training)
        if not packs:
            model.set_attn_implementation(own)
        return packs

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
        if self.sharding is not None:
            return self.whole
        return {name: value.detach().to("cpu", copy=True) for name, value in named_tensors(self)}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Loads a state of `get_state`; refuses one of another architecture."""
        if self.sharding is not None:
            self.sharding.load_weights(self, state)
            return
        own = self.state_dict()
        self.check_state(state, {name: tuple(value.shape) for name, value in own.items()})
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

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
                f"The weights belong to another model: {name!r} {problem}. Use the model= setting "
                "that the weights were made with."
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
