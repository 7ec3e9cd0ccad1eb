"""Models and tokenizers: from a directory, a hub id, or made from a config.  No ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rllib_gtpo.errors import ChatTemplateError, ConfigError, did_you_mean, refuse_unknown_keys
from rllib_gtpo.progress import draw_bars_only_on_terminals

TINY_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # A short wavelength: conversations are short, and copying needs exact positions.
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": True,
}
"""The default model: about a third of a million parameters, made from this config."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("```python\n", "\n```", "print(", "user\n", "assistant\n", "tool\n", "\nleft: ")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(extra: Sequence[str] = ()) -> Any:
    """A byte-level tokenizer with a ChatML template, made in code.

    Every text round-trips exactly.  There is one token for each byte, and one for each of a few
    strings that agents write often and for each string of `extra`, which keeps turns short.  Tool
    schemas are not rendered: a model made from scratch learns its tools from demonstrations.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    strings = sorted({*_MARKUP, *extra}, key=lambda text: (-len(text), text))
    if "" in strings or set(strings) & set(_SPECIAL) or not all(map(str.isascii, strings)):
        raise ConfigError(
            f"extra={list(extra)!r}: tokens must be ASCII, and neither empty nor special."
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in _SPECIAL])
    # Added tokens, and no split of our own: transformers keeps them when it loads a saved tokenizer
    # as the class of the model's architecture, and replaces everything else by that class's own.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in strings])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(source: Any, *, chat_template: str | None = None) -> Any:
    """The tokenizer of a directory or hub id, or the built-in one for a model from scratch.

    Args:
        source: A path, a hub id, a from-scratch config, or a tokenizer.
        chat_template: The text of a template or the path of a file with one, instead of the
            tokenizer's own.

    Raises:
        ConfigError: There is no such directory, file or tokenizer.
        ChatTemplateError: The tokenizer has no chat template, and none was given.
    """
    tokenizer = _tokenizer(source)
    if chat_template is not None:
        # A file's name is short and has no braces; a template has.
        file = (
            Path(chat_template) if len(chat_template) < 1024 and "{" not in chat_template else None
        )
        if file is not None and not file.is_file():
            raise ConfigError(
                f"chat_template={chat_template!r}: no such file, and not a template's text."
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else chat_template
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer of {str(source)!r} has no chat template: use an instruction-tuned "
            "model, or set chat_template= to a template's text or file."
        )
    return tokenizer


def load_model(
    source: Any, *, dtype: str = "float32", seed: int | None = None, tokenizer: Any = None
) -> Any:
    """A causal LM from a directory or hub id, or made from scratch, in evaluation mode.

    It has no dropout in any mode: RLlib puts a module that is trained into training mode, and its
    probabilities would not be the sampler's.

    Args:
        source: A path, a hub id, or a config such as `TINY_QWEN2`.
        dtype: "float32" or "bfloat16".
        seed: From scratch, the weights are a function of it alone (None: 0); torch's global
            generators are left as they were.
        tokenizer: What `load_tokenizer` takes.  From scratch, its vocabulary is the model's
            (without one, the built-in tokenizer's); otherwise it must fit the model's.

    Raises:
        ConfigError: `source` is no model, or the tokenizer has ids that the model lacks.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}.")
    if isinstance(source, Mapping):
        return _from_scratch(dict(source), _DTYPES[dtype], seed or 0, tokenizer)
    model = without_dropout(
        from_pretrained("AutoModelForCausalLM", str(source), dtype=_DTYPES[dtype])
    )
    if tokenizer is not None:
        check_vocabulary(_tokenizer(tokenizer), int(model.get_input_embeddings().weight.shape[0]))
    _check_dtypes(source, model, _DTYPES[dtype])
    return model


def without_dropout(model: Any) -> Any:
    """The model with all its rates at 0, those of layers and those that attention is called with;
    its config, and what is saved of it, keep them."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "p"):
                setattr(module, name, 0.0)
    return model


def load_config(source: Any, tokenizer: Any = None) -> Any:
    """The transformers config of what `load_model` would load, without any weights."""
    if isinstance(source, Mapping):
        return _scratch_config(dict(source), tokenizer)
    return from_pretrained("AutoConfig", str(source))


def check_source(source: Any, tokenizer: Any) -> None:
    """Refuses a `model` that cannot be one, without loading anything."""
    if isinstance(source, Mapping):
        if tokenizer is None:
            _scratch_config(dict(source), None)
    elif not isinstance(source, (str, Path)):
        raise ConfigError(
            f"model={source!r}: a directory, a hub id, or a mapping that describes a model."
        )


def max_positions(config: Any) -> int:
    """Most tokens that a model's positions allow."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))


def architecture_of(config: Any) -> str:
    """The name of the class that `load_model` makes of a config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    name: str = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return name


def _scratch_config(settings: dict[str, Any], tokenizer: Any) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    described = f"model={settings!r}"
    if "model_type" not in settings:
        raise ConfigError(
            "model: one from scratch needs a model_type, such as {'model_type': 'qwen2', ...}."
        )
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING)
        raise ConfigError(
            f"{described} does not describe a causal LM: transformers has no such model_type{near}"
        )
    default = AutoConfig.for_model(model_type)
    known = {*vars(default), *default.attribute_map, *(k for k in settings if hasattr(default, k))}
    refuse_unknown_keys("model", settings, known)
    tokens = _tokenizer(tokenizer if tokenizer is not None else settings)
    settings.setdefault("vocab_size", len(tokens))
    check_vocabulary(tokens, int(settings["vocab_size"]))
    settings.setdefault("pad_token_id", tokens.pad_token_id)
    settings.setdefault("eos_token_id", tokens.eos_token_id)
    settings.setdefault("bos_token_id", None)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{described} does not describe a causal LM: {error}") from error


def _from_scratch(settings: dict[str, Any], dtype: torch.dtype, seed: int, tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = _scratch_config(dict(settings), tokenizer)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                seed
            )  # torch.manual_seed would touch the GPUs' as well
            return without_dropout(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model={settings!r} does not describe a causal LM: {error}") from error


def _tokenizer(source: Any) -> Any:
    if isinstance(source, Mapping):
        return build_tokenizer()
    if isinstance(source, (str, Path)):
        return from_pretrained("AutoTokenizer", str(source))
    return source


def check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Raises ConfigError if a tokenizer has ids beyond the `rows` of a model's embeddings."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise ConfigError(
            f"The tokenizer has {needed} tokens and the model only {rows}: use the model's own "
            "tokenizer (leave tokenizer= out), a larger vocab_size for a model from scratch, or "
            f"save the model again after model.resize_token_embeddings({needed})."
        )


def _check_dtypes(source: Any, model: Any, dtype: torch.dtype) -> None:
    """What is not of `dtype` now is quantised, or its model insists."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            kept, asked = (str(d).removeprefix("torch.") for d in (parameter.dtype, dtype))
            raise ConfigError(
                f"model={str(source)!r} cannot be trained with dtype={asked!r}: its {name!r} stays "
                f"{kept}. Use dtype='float32', or weights that are not quantised."
            )


def is_local(source: str) -> bool:
    """Whether this names a directory, be it one that is missing, and not a hub id."""
    return source.startswith((".", "/", "~")) or Path(source).exists()


def from_pretrained(auto_class: str, source: str, **options: Any) -> Any:
    """What a class of transformers loads from a directory or hub id; ConfigError if it cannot."""
    import transformers

    draw_bars_only_on_terminals()
    local = is_local(source)
    path = str(Path(source).expanduser()) if local else source
    what = "tokenizer" if auto_class == "AutoTokenizer" else "model"
    if local and not Path(path).is_dir():
        raise ConfigError(f"{what}={source!r}: no such directory.")
    try:
        return getattr(transformers, auto_class).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what}={source!r} cannot be loaded: {error}") from error
