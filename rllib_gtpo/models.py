"""Models and tokenizers: from a directory, a hub id, or made from scratch out of a config.  No ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rllib_gtpo.errors import ConfigError

TINY_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
"""The default model: about half a million parameters, made from this config."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("```python\n", "\n```", "print(", "user\n", "assistant\n", "tool\n")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(markup: Sequence[str] = _MARKUP) -> Any:
    """A byte-level tokenizer with a ChatML template, made in code.

    Every text round-trips exactly: 256 byte tokens, plus one token for each string of `markup`, which
    keeps turns short.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in _SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in markup])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: Any, *, chat_template: str | None = None) -> Any:
    """The tokenizer of a directory or hub id, or the built-in one for a model from scratch."""
    if isinstance(source, Mapping):
        tokenizer = build_tokenizer()
    elif isinstance(source, (str, Path)):
        tokenizer = _from_pretrained("AutoTokenizer", str(source))
    else:
        tokenizer = source
    if chat_template is not None:
        file = Path(chat_template) if len(chat_template) < 1024 and "{" not in chat_template else None
        if file is not None and not file.is_file():
            raise ConfigError(f"chat_template={chat_template!r}: no such file, and not a template's text.")
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else chat_template
    return tokenizer


def load_model(source: Any, *, dtype: str = "float32", seed: int = 0, tokenizer: Any = None) -> Any:
    """A causal LM from a directory or hub id, or made from scratch.

    From scratch, weights are a function of `seed` alone, and torch's global generator is left as it was;
    the vocabulary is that of `tokenizer` (or of the built-in one), rounded up to a multiple of 16.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}.")
    if not isinstance(source, Mapping):
        return _from_pretrained("AutoModelForCausalLM", str(source), dtype=_DTYPES[dtype])
    settings = dict(source)
    if "model_type" not in settings:
        raise ConfigError("A model from scratch needs a model_type, such as {'model_type': 'qwen2', ...}.")
    tokens = load_tokenizer(tokenizer if tokenizer is not None else source)
    settings.setdefault("vocab_size", -(-len(tokens) // 16) * 16)
    settings.setdefault("pad_token_id", tokens.pad_token_id)
    settings.setdefault("eos_token_id", tokens.eos_token_id)
    settings.setdefault("bos_token_id", None)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model={source!r} does not describe a model: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype])


def _from_pretrained(auto_class: str, source: str, **options: Any) -> Any:
    import transformers

    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    path = str(Path(source).expanduser()) if looks_local else source
    if looks_local and not Path(path).is_dir():
        raise ConfigError(f"model={source!r}: no such directory.")
    try:
        return getattr(transformers, auto_class).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={source!r} cannot be loaded: {error}") from error
