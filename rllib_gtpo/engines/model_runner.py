"""Forwards of a transformers causal LM over the rows of a `BatchCache`.

A step's tokens, of trajectories that go on and of those that come back with a longer context, go
through the model in one forward, packed in one row without padding; only the attention tells
trajectories apart.  Whether a model can do that is tried once.  With one that cannot, each part of
them is a forward of its own, its rows padded on the left, and the public `logits_to_keep=1`
computes exactly the logits that are needed, whatever a model does to them after its head.

Shape suffixes: see `rows`; _V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rllib_gtpo.engines.kv_cache import BatchCache
from rllib_gtpo.engines.rows import GROUPED_ATTENTION, Part, Reach
from rllib_gtpo.errors import ConfigError

ONE_THREAD = 64_000_000  # parameters x tokens of a step that more threads hardly quicken


def check_model(model: PreTrainedModel, max_context: int) -> None:
    """Refuses models for which a cache of plain keys and values and a 4-D mask would be wrong."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if "sliding_attention" not in kinds and getattr(config, "layer_types", None):
        window = None
    if window is not None and window < max_context:
        raise ConfigError(
            f"{type(model).__name__} attends to a sliding window of {window} tokens, and the hf "
            f"engine does not: set max_context <= {window} or use the vllm engine"
        )
    if odd := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{type(model).__name__} has layers of type {sorted(odd)}; the hf engine keeps only "
            "keys and values of full attention: use the vllm engine"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_context > longest:
        raise ConfigError(f"max_context={max_context} exceeds the model's {longest}: lower it")


class ModelRunner:
    """Runs a model's forwards over the rows of a cache.

    A model whose attention is "eager" keeps it.  Any other is switched to `rows_attention` for the
    time of a forward.

    Args:
        model: the causal LM; it may be trained elsewhere between forwards.
        cache: its rows.
        prefill_tokens: most tokens, padding included, of one forward that is no mere decoding.
    """

    def __init__(self, model: PreTrainedModel, cache: BatchCache, prefill_tokens: int) -> None:
        self.model = model
        self.cache = cache
        self.prefill_tokens = prefill_tokens
        self.forwards = 0
        self._config = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(model.forward).parameters.values()
        self._cuts_logits = any(
            p.name == "logits_to_keep" or p.kind is p.VAR_KEYWORD for p in parameters
        )
        # To walk over modules or parameters, as for a model's device, takes longer than a layer.
        self._modules = list(model.modules())
        self._weight = model.get_input_embeddings().weight
        self._swap = getattr(model, "_supports_attention_backend", False)
        self._parameters = sum(p.numel() for p in model.parameters())
        self.packs = self._can_pack()

    @contextmanager
    def inference(self, tokens: int) -> Iterator[None]:
        """No gradients, no dropout, the engine's attention; everything is as before afterwards.

        A step of few `tokens` through a small model has one thread: more would wait for each other
        at every layer, and for as long as a tool's process has their core.
        """
        threads = torch.get_num_threads()
        small = self._weight.device.type == "cpu" and self._parameters * tokens <= ONE_THREAD
        training = [m for m in self._modules if m.training]
        for module in training:
            module.training = False
        attention = self._config._attn_implementation
        swap = self._swap and attention != "eager"
        try:
            if small:
                torch.set_num_threads(1)
            if swap:
                self._config._attn_implementation = GROUPED_ATTENTION
            with torch.inference_mode():
                yield
        finally:
            if small:
                torch.set_num_threads(threads)
            if swap:
                self._config._attn_implementation = attention
            for module in training:
                module.training = True

    def compute(self, parts: Sequence[Part]) -> Tensor:
        """Logits [B, V] after the new tokens of each row, in the order of the parts."""
        logits = []
        together: list[Part] = []
        for part in parts:
            *before, last = part.cut(self.prefill_tokens)
            for piece in before:
                self._forward([piece])
            if together and sum(map(len, together)) + len(last) > self._most_tokens:
                logits.append(self._forward(together))
                together = []
            together.append(last)
        logits.append(self._forward(together))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @property
    def _most_tokens(self) -> int:
        """Of parts that share a forward."""
        return self.prefill_tokens if self.packs else 0

    def _forward(self, parts: list[Part]) -> Tensor:
        """Logits after the last token of each row; several parts only if packed."""
        self.forwards += 1
        rows_N = np.concatenate([part.rows_N for part in parts])
        column_N = np.concatenate([part.without_padding(part.position_BQ) for part in parts])
        reaches = [self._reach(part) for part in parts]
        if not self.packs:
            return self._padded_forward(parts[0], reaches[0], rows_N, column_N)
        ids_N = np.concatenate([part.without_padding(part.ids_BQ) for part in parts])
        position_N = self._tensor(column_N)
        self.cache.select(self._tensor(rows_N), position_N)
        ends_B = np.flatnonzero(np.diff(rows_N, append=-1))  # where a row's tokens end
        output = self.model(
            input_ids=self._tensor(ids_N)[None],
            position_ids=position_N[None],
            attention_mask=reaches[0].mask_B1QC,  # any will do, for each part brings its own
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._tensor(ends_B),
            reaches=reaches,
        )
        return output.logits[0]

    def _padded_forward(
        self, part: Part, reach: Reach, rows_N: np.ndarray, column_N: np.ndarray
    ) -> Tensor:
        self.cache.select(self._tensor(rows_N), self._tensor(column_N), reach.real_N, reach.view)
        output = self.model(
            input_ids=self._tensor(part.ids_BQ),
            position_ids=self._tensor(part.position_BQ),
            attention_mask=reach.mask_B1QC,
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self._cuts_logits else {}),
        )
        return output.logits[:, -1]

    def _reach(self, part: Part) -> Reach:
        columns = min(-(-int(part.position_BQ.max() + 1) // 8) * 8, self.cache.columns)
        return Reach(part, columns, self._weight.dtype, self._weight.device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._weight.device)

    def _can_pack(self) -> bool:
        """Whether a packed row computes what padded ones do.

        That is tried, since nothing but its own code says whether a model hands on to its attention
        what it was called with.  A difference counts as none if it is small beside what a token
        makes of its context.
        """
        self.packs = False
        if not self._swap or not self._cuts_logits or self._config._attn_implementation == "eager":
            return False
        first, *others, alone = (np.arange(n) % len(self._weight) for n in (4, 2, 3, 1))
        own, forwards = self.cache, self.forwards

        def logits(packs: bool) -> Tensor:
            self.packs = packs
            self.cache = BatchCache(4, 8, 32)
            self.cache.reserve(4, 8, 0, 8)
            self.compute([Part.of(0, [first], [0])])
            parts = [Part.one_each(alone.tolist(), [len(first)])]
            parts += [Part.of(1, others, [0, 0]), Part.of(3, [alone], [0])]
            return self.compute(parts).float()

        try:
            with self.inference(16):
                padded, packed = logits(False), logits(True)
            leak = (padded[0] - padded[-1]).abs().max()
            return bool((packed - padded).abs().max() < leak / 4)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        finally:
            self.packs = False
            self.cache, self.forwards = own, forwards
