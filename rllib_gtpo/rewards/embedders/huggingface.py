"""Any Hugging Face encoder, in the env runner's own process.

A text is the mean of the last hidden state over its tokens.  A sentence-transformers model that
pools otherwise runs through that package (the extra `sentence-transformers`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rllib_gtpo.encodable import encodable
from rllib_gtpo.errors import ConfigError, EmbedderError
from rllib_gtpo.rewards.embedders.base import check_positive, unit_vector

_WEIGHTS_AND_SETTINGS = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
_PLAIN_MODULES = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True)
class HuggingFace:
    """Embeds with a model of `transformers` or of sentence-transformers.

    The last bits of a vector depend on which other texts are in its batch.

    model: A directory or a hub id.
    batch_size: Texts at once.
    device: "cpu", "cuda", ...; None takes a GPU if the env runner has one
        (`num_gpus_per_env_runner`).
    max_tokens: Texts are cut off behind so many tokens; None: what the model can hold.
    """

    model: str = ""
    batch_size: int = 32
    device: str | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        limits = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        check_positive("huggingface", batch_size=self.batch_size, **limits)
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(
                "embedder 'huggingface' needs a model: {'name': 'huggingface', 'model': a "
                "directory or a hub id}."
            )
        if self.model.startswith((".", "/", "~")) and not self._path.is_dir():
            raise ConfigError(f"embedder 'huggingface': model={self.model!r}: no such directory.")

    @cached_property
    def identity(self) -> str:
        """See Embedder.  Holds a digest of the model's files, or its commit on the hub."""
        if not self._is_local:
            version = self._directory.name
        else:
            digest = hashlib.sha256()
            for file in sorted({f for p in _WEIGHTS_AND_SETTINGS for f in self._path.rglob(p)}):
                digest.update(str(file.relative_to(self._path)).encode())
                with file.open("rb") as data:
                    digest.update(hashlib.file_digest(data, "sha256").digest())
            version = digest.hexdigest()
        backend = "sentence-transformers" if self._by_sentence_transformers else "mean"
        return f"huggingface {self.model} {version} {backend} max_tokens={self.max_tokens}"

    def embed(self, texts: Sequence[str]) -> list[np.ndarray | Exception]:
        """See Embedder.

        Raises:
            ConfigError: The model cannot be loaded, or needs sentence-transformers.
        """
        results: dict[int, np.ndarray | Exception] = {}
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(texts), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            batch = [encodable(texts[index]) for index in indices]
            results.update(zip(indices, self._batch(batch), strict=True))
        return [results[index] for index in range(len(texts))]

    def _batch(self, texts: list[str]) -> list[np.ndarray | Exception]:
        encode = self._encode
        try:
            rows = encode(texts)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(texts) > 1:  # whose fault is it?
                return [result for text in texts for result in self._batch([text])]
            return [EmbedderError(f"huggingface {self.model}: {error!r}")]
        return [_vector(row) for row in rows]

    @cached_property
    def _encode(self) -> Any:
        """A function from texts to rows of numbers."""
        import torch

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self._by_sentence_transformers:
            return self._sentence_encoder(device)
        return self._mean_encoder(device)

    def _sentence_encoder(self, device: str) -> Any:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(self._source, device=device)
        if self.max_tokens is not None:
            model.max_seq_length = min(self.max_tokens, model.max_seq_length or self.max_tokens)

        def encode(texts: list[str]) -> Any:
            return model.encode(texts, batch_size=self.batch_size, show_progress_bar=False)

        return encode

    def _mean_encoder(self, device: str) -> Any:
        import torch

        from rllib_gtpo.models import from_pretrained

        tokenizer = from_pretrained("AutoTokenizer", self._source)
        model = from_pretrained("AutoModel", self._source, dtype=torch.float32).to(device).eval()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        limit = min(self.max_tokens or 2**31, tokenizer.model_max_length, _positions(model))

        def encode(texts: list[str]) -> Any:
            with torch.inference_mode():
                batch = tokenizer(
                    texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
                ).to(device)
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                return ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

        return encode

    @cached_property
    def _by_sentence_transformers(self) -> bool:
        modules = self._directory / "modules.json"
        if not modules.is_file():
            return False
        if importlib.util.find_spec("sentence_transformers") is not None:
            return True
        kinds = {module["type"].rsplit(".", 1)[-1] for module in json.loads(modules.read_text())}
        if kinds <= _PLAIN_MODULES and _pools_by_mean(self._directory):
            return False
        raise ConfigError(
            f"embedder 'huggingface': model={self.model!r} is a sentence-transformers model that "
            "does not take the plain mean: pip install 'rllib-gtpo[sentence-transformers]'."
        )

    @property
    def _path(self) -> Path:
        return Path(self.model).expanduser()

    @property
    def _is_local(self) -> bool:
        return self._path.is_dir()

    @property
    def _source(self) -> str:
        return str(self._path) if self._is_local else self.model

    @cached_property
    def _directory(self) -> Path:
        """Where the model's small settings files are; those of a hub model are fetched."""
        if self._is_local:
            return self._path
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            wanted = ["config.json", "modules.json", "*_Pooling/config.json"]
            return Path(snapshot_download(self.model, allow_patterns=wanted))
        except (OSError, HFValidationError, HfHubHTTPError) as error:
            raise ConfigError(
                f"embedder 'huggingface': model={self.model!r} is neither a directory nor a model "
                f"on the hub: {error}"
            ) from error


def _pools_by_mean(directory: Path) -> bool:
    for file in directory.glob("*_Pooling/config.json"):
        settings = json.loads(file.read_text())
        modes = [k for k, on in settings.items() if k.startswith("pooling_mode_") and on]
        if modes != ["pooling_mode_mean_tokens"] and settings.get("pooling_mode") != "mean":
            return False
    return True


def _positions(model: Any) -> int:
    """How many tokens the model has positions for."""
    most = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return most - padding - 1  # RoBERTa and its kin count from behind the padding's id
    return most


def _vector(row: Any) -> np.ndarray | Exception:
    try:
        return unit_vector(row, len(row))
    except EmbedderError as error:
        return error
