"""LoRA through peft: what is trained, kept and sent is the adapter, and a mark says of which base.

peft's layers are put into the model in place, so that whatever takes a Hugging Face model takes one
with an adapter, too.  No ray here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rllib_gtpo.errors import ConfigError, did_you_mean, refuse_unknown_keys

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

BASE_MARK = "base_mark"  # in the state of an adapter: tells its base model from any other
ALL_LINEAR = "all-linear"
_ADAPTER = "default"  # peft's name for the only one
_MODULE_PREFIX = "model."  # the attribute of the RLModule that holds the Hugging Face model
_PEFT_PREFIX = "base_model.model."
_SAMPLES = 64  # values of each tensor of the base that its mark looks at
WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LoRASettings:
    """Settings of `language_model(lora={...})`.

    rank: of the two matrices that are trained for each target.
    alpha: the product of the two is scaled by alpha / rank.
    targets: "all-linear" (all linear layers but the output head), or the ends of module names,
        such as ["q_proj", "v_proj"].
    dropout: of the adapter's input in supervised training; reinforcement compares with what was
        sampled, and trains without.
    rslora: scale by alpha / sqrt(rank) instead.
    """

    rank: int = 8
    alpha: float = 16
    targets: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    rslora: bool = False

    @staticmethod
    def of(settings: Mapping[str, Any] | None) -> LoRASettings | None:
        """From a config's dict; unknown keys and impossible values raise ConfigError."""
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"lora={settings!r}: give a dict, such as {{'rank': 8}}, or None.")
        refuse_unknown_keys("lora", settings, [f.name for f in fields(LoRASettings)])
        chosen = LoRASettings(**settings)
        rank, alpha, dropout, targets = chosen.rank, chosen.alpha, chosen.dropout, chosen.targets
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"lora.rank={rank!r}: must be a whole number of at least 1.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
            raise ConfigError(f"lora.alpha={alpha!r}: must be a number above 0.")
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ConfigError(f"lora.dropout={dropout!r}: must lie in [0, 1).")
        if not isinstance(chosen.rslora, bool):
            raise ConfigError(f"lora.rslora={chosen.rslora!r}: true or false.")
        names = isinstance(targets, (list, tuple)) and targets
        if targets != ALL_LINEAR and not (names and all(isinstance(t, str) for t in targets)):
            raise ConfigError(
                f"lora.targets={targets!r}: {ALL_LINEAR!r}, or a list of ends of module names, "
                "such as ['q_proj', 'v_proj']."
            )
        return chosen


def check_lora(config: GTPOConfig) -> None:
    """Raises ConfigError for settings that do not go together with an adapter."""
    settings = LoRASettings.of(config.lora)
    if settings is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "lora needs the package peft: pip install 'rllib-gtpo[lora]', or leave lora out."
        )
    if settings.dropout and config.cold_start is None:
        raise ConfigError(
            f"lora.dropout={settings.dropout} has no effect without a cold start: reinforcement "
            "trains without dropout, or its probabilities would not be the sampler's. Leave it out."
        )
    if config.kl_coeff and config.cold_start is not None:
        raise ConfigError(
            f"kl_coeff={config.kl_coeff} with lora and a cold start: the reference is the model "
            "with its adapter off, so that KL would undo the cold start. Train that as SFT first, "
            "`rllib export` the merged model, and set model= to that directory; or leave out one "
            "of the three."
        )
    if config.strategy == "deepspeed" and config.dtype == "bfloat16":
        raise ConfigError(
            "lora with dtype='bfloat16' and strategy='deepspeed': DeepSpeed would turn the "
            "adapter's float32 weights into bfloat16. Use strategy='fsdp2' or 'ddp', or "
            "dtype='float32'."
        )


def add_adapter(model: Any, settings: LoRASettings, seed: int) -> Any:
    """Freezes the model and puts an adapter in, which changes nothing yet; peft's own config.

    The adapter is float32 whatever the model is: its updates are small beside its values.  Its
    random half is a function of `seed`, so that all who build it have the same.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = settings.targets
    made = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    _check_targets(model, targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(made, model, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _set_dropout(model, 0.0)
    return made


def _check_targets(model: Any, targets: str | Sequence[str]) -> None:
    """Each must be the end of the name of a linear layer, and none the embeddings'."""
    if targets == ALL_LINEAR:
        return
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module not in embeddings
    }
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora.targets has {target!r}, which is no linear layer of the model besides its "
                f"output head{did_you_mean(target, ends)}"
            )


def base_mark(model: Any) -> Tensor:
    """A hash of names, shapes and a sample of the values of a model without an adapter.

    In bfloat16, so that the same files have the same mark whatever they are loaded as.
    """
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16).contiguous()
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


def check_state_kind(
    state: Mapping[str, Tensor], own_mark: Tensor | None, own_names: Iterable[str]
) -> None:
    """Raises ConfigError if an adapter meets whole weights, another base, or other targets.

    A part of a state would leave the rest as it was, silently.

    Args:
        state: What is to be loaded.
        own_mark: Of the module that is to load it; None: it has no adapter.
        own_names: Of that module's adapter.
    """
    mark = state.get(BASE_MARK)
    if own_mark is None:
        if mark is not None:
            raise ConfigError(
                "The weights are those of a LoRA adapter alone: set language_model(lora=...) as "
                "they were made with, or start from the merged model that `rllib export` writes."
            )
        return
    if mark is None:
        raise ConfigError(
            "The weights are those of a whole model, and this run trains a LoRA adapter "
            "(language_model(lora=...)): leave lora out, or `rllib export` them and set model= to "
            "that directory."
        )
    if not torch.equal(mark.cpu(), own_mark.cpu()):
        raise ConfigError(
            "The LoRA adapter belongs to another base model: use the model= that it was trained "
            "with (and for one made from scratch its seed and dtype)."
        )
    missing = sorted(set(own_names) - state.keys())
    if missing:
        raise ConfigError(
            f"The LoRA adapter has no weights for {missing[0]!r}: use the lora targets that it was "
            "trained with."
        )


def _layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model as it is without its adapter.

    By its scale: peft's own switch makes parameters untrainable for a while, and sharded ones that
    are gathered for the first time then stay so.
    """
    layers = [layer for _, layer in _layers(model)]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[_ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


@contextlib.contextmanager
def dropout_on(model: Any) -> Iterator[None]:
    """The adapter's dropout at work.

    By its rate, which is 0 otherwise: RLlib puts a module that is trained into training mode.
    """
    try:
        _set_dropout(model, model.peft_config[_ADAPTER].lora_dropout)
        yield
    finally:
        _set_dropout(model, 0.0)


def _set_dropout(model: Any, rate: float) -> None:
    for _, layer in _layers(model):
        if isinstance(dropout := layer.lora_dropout[_ADAPTER], torch.nn.Dropout):
            dropout.p = rate


def merge(model: Any) -> Any:
    """Adds the adapter to the weights, and takes peft's layers out."""
    for name, layer in _layers(model):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def adapter_files(
    peft_config: Any, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, bytes]:
    """The files of a directory in peft's format, by name.

    Args:
        peft_config: What `add_adapter` gave.
        state: Of an LLMModule.
        dtype: Of the weights; None leaves them as they are.
    """
    from safetensors.torch import save

    weights = {
        _peft_name(name): value.detach().to("cpu", dtype or value.dtype).contiguous()
        for name, value in state.items()
        if name != BASE_MARK
    }
    with tempfile.TemporaryDirectory() as folder:
        peft_config.save_pretrained(folder)
        config = Path(folder, _CONFIG_FILE).read_bytes()
    return {_CONFIG_FILE: config, WEIGHTS_FILE: save(weights, {"format": "pt"})}


def _peft_name(name: str) -> str:
    return _PEFT_PREFIX + name.removeprefix(_MODULE_PREFIX).replace(f".{_ADAPTER}.", ".")
