"""Forwards of a transformers causal LM over the rows of a `BatchCache`.

Two shapes of forward: *decode*, one token for each of the first n rows, and *prefill*, the new
tokens of some contiguous rows.  Rows of a prefill are padded on the left, so that the last column
is the last real token of every row and the public `logits_to_keep=1` computes exactly the logits
that are needed, whatever a model does to them after its head.

Shape suffixes: _B row, _Q new token of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rllib_gtpo.engines.kv_cache import BatchCache
from rllib_gtpo.errors import ConfigError

GROUPED_ATTENTION = "rllib_gtpo_grouped"
ONE_THREAD = 64_000_000  # parameters x tokens of a step that more threads hardly quicken


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention that never copies the cache to repeat key-value heads.

    The stock function repeats all keys and values of all rows for each new token.  With one query
    per row, the heads that share a key-value head can stand in the query dimension instead.
    """
    batch, heads, length, width = query.shape
    if heads == key.shape[1] or attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    if length == 1:
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
        out = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scale
        )
        return out.reshape(batch, 1, heads, value.shape[-1]), None
    if query.device.type != "cpu":  # there, grouped heads with a mask mean the slowest kernel
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)


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

    A model whose attention is "eager" keeps it.  Any other is switched to `grouped_attention` for
    the time of a forward.

    Args:
        model: the causal LM; it may be trained elsewhere between forwards.
        cache: its rows.
        prefill_tokens: most tokens, padding included, of one prefill forward.
    """

    def __init__(self, model: PreTrainedModel, cache: BatchCache, prefill_tokens: int) -> None:
        self.model = model
        self.cache = cache
        self.prefill_tokens = prefill_tokens
        self._config = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(model.forward).parameters.values()
        self._extra = {}
        if any(p.name == "logits_to_keep" or p.kind is p.VAR_KEYWORD for p in parameters):
            self._extra["logits_to_keep"] = 1
        self._modules = list(model.modules())  # to walk them takes longer than a small layer
        self._swap = getattr(model, "_supports_attention_backend", False)
        self._parameters = sum(p.numel() for p in model.parameters())

    @contextmanager
    def inference(self, tokens: int) -> Iterator[None]:
        """No gradients, no dropout, the engine's attention; everything is as before afterwards.

        A step of few `tokens` through a small model has one thread: more would wait for each other
        at every layer, and for as long as a tool's process has their core.
        """
        threads = torch.get_num_threads()
        small = self.model.device.type == "cpu" and self._parameters * tokens <= ONE_THREAD
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

    def decode(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Logits after one more token for each of the first rows."""
        ids_BQ = np.array(tokens, dtype=np.int64)[:, None]
        position_BQ = np.array(positions, dtype=np.int64)[:, None]
        return self._forward(0, ids_BQ, position_BQ, None)

    def prefill(self, first: int, ids: list[np.ndarray], starts: list[int]) -> torch.Tensor:
        """Logits after the new tokens of the rows from `first` on.

        Args:
            first: the first row.
            ids: the new tokens of each row, at least one.
            starts: how many tokens of each row the cache already holds.
        """
        lengths_B = np.array([len(new) for new in ids])
        width = int(lengths_B.max())
        column_BQ = np.arange(width)[None] - (width - lengths_B)[:, None]
        real_BQ = column_BQ >= 0
        ids_BQ = np.zeros(real_BQ.shape, dtype=np.int64)
        ids_BQ[real_BQ] = np.concatenate(ids)
        position_BQ = np.where(real_BQ, column_BQ + np.array(starts)[:, None], 0)
        chunk = max(self.prefill_tokens // len(ids), 1)
        for end in range(width - (width - 1) // chunk * chunk, width + 1, chunk):
            part = slice(max(end - chunk, 0), end)
            logits = self._forward(first, ids_BQ[:, part], position_BQ[:, part], real_BQ[:, part])
        return logits

    def _forward(
        self, first: int, ids_BQ: np.ndarray, position_BQ: np.ndarray, real_BQ: np.ndarray | None
    ) -> torch.Tensor:
        device = self.model.device
        columns = min(-(-int(position_BQ.max() + 1) // 8) * 8, self.cache.columns)
        position = torch.from_numpy(np.ascontiguousarray(position_BQ)).to(device)
        real = None
        if real_BQ is not None and not real_BQ.all():
            rows, queries = (torch.from_numpy(i).to(device) for i in real_BQ.nonzero())
            real = (rows, queries)
        self.cache.select(first, position, columns, real)
        dtype = self.model.dtype
        hidden = torch.arange(columns, device=device) > position[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        output = self.model(
            input_ids=torch.from_numpy(np.ascontiguousarray(ids_BQ)).to(device),
            attention_mask=mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            **self._extra,
        )
        return output.logits[:, -1]
