"""`rllib export`: the policy of a checkpoint as a Hugging Face directory that stands alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rllib_gtpo.command.checkpoint import held_checkpoint, load_config
from rllib_gtpo.command.reading import reading
from rllib_gtpo.errors import ConfigError, GTPOError
from rllib_gtpo.lora import BASE_MARK, adapter_files, merge
from rllib_gtpo.models import is_local
from rllib_gtpo.progress import draw_bars_only_on_terminals

MODULE = Path("learner_group", "learner", "rl_module", "default_policy")
DTYPES = ("float32", "bfloat16", "float16")
_TRAINED_WITH = (
    *("estimator", "gamma", "group_size", "groups_per_step", "lr", "clip_low", "clip_high"),
    *("kl_coeff", "shaping", "temperature", "max_turns", "max_turn_tokens", "max_tokens"),
    *("call_format", "dtype", "lora", "seed"),
)
_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [reinforcement-learning, tool-use, rllib, {tag}]
{base}---

# {name}

A language model that uses tools over several turns, trained with {algorithm} (rllib-gtpo).

{facts}
## How it was trained

| setting | value |
|---|---|
{settings}

Versions: {versions}.

## How it is used

The chat template is the one that it was trained with; it writes tool calls in the
`{call_format}` format.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
{load}
messages = [{{"role": "user", "content": "..."}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={max_tokens})[0]))
```
"""

_LOAD_MODEL = 'model = AutoModelForCausalLM.from_pretrained(".")'
_LOAD_ADAPTER = """\
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, ".")  # from peft import PeftModel"""


def export(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    push_to: str | None = None,
    adapter: bool = False,
) -> str:
    """Writes weights (safetensors), tokenizer, template, generation config and a model card.

    A LoRA adapter is merged into its model.  `target` appears when it is complete.

    Args:
        source: A run directory (its last checkpoint) or a checkpoint.
        target: The directory to make.
        dtype: Of the weights; None keeps that of training.
        push_to: A hub repository (owner/name) to upload the directory to, private if it is new.
        adapter: Write the adapter alone, in peft's format, instead of a model.

    Returns:
        What was done, in one line.

    Raises:
        ConfigError: `source` is no checkpoint of a language model, or has no adapter to be
            written, or `target` exists.
    """
    if target.exists():
        raise ConfigError(f"{target} exists: remove it, or name another directory.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}.")
    with held_checkpoint(source) as checkpoint:
        done = _write(checkpoint, target, dtype, adapter)
    if push_to is not None:
        done += f" and to {_push(target, push_to)}"
    return done


def _write(checkpoint: Path, target: Path, dtype: str | None, adapter: bool) -> str:
    config = _config(checkpoint)
    if adapter and config.lora is None:
        raise ConfigError(f"{checkpoint} was trained without lora: leave --adapter out.")
    module, codec = _module(checkpoint), config.build_codec()
    unfinished = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        save = _save_adapter if adapter else _save_model
        parameters = save(module, unfinished, config, codec, dtype)
        codec.tokenizer.save_pretrained(unfinished)
        card = unfinished / "README.md"
        card.write_text(_card(target.name, checkpoint, config, codec.call_format.name, adapter))
        for file in unfinished.iterdir():  # safetensors makes files for the owner's eyes only
            file.chmod(card.stat().st_mode)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.rglob("*")) / 1e6
    what = f"{parameters:,} parameters, {size:.1f} MB"
    return f"exported {checkpoint} to {target} ({what})"


def _config(checkpoint: Path) -> Any:
    from rllib_gtpo.config import GTPOConfig

    config = load_config(checkpoint)
    if not isinstance(config, GTPOConfig):
        name = config.algo_class.__name__
        raise ConfigError(f"{checkpoint} is a checkpoint of {name}, which has no language model.")
    return config


def _module(checkpoint: Path) -> Any:
    from ray.rllib.core.rl_module.rl_module import RLModule

    with reading(checkpoint):
        return RLModule.from_checkpoint(str((checkpoint / MODULE).absolute()))


def _save_model(module: Any, folder: Path, config: Any, codec: Any, dtype: str | None) -> int:
    """The number of parameters."""
    import torch

    model = module.model
    wanted = getattr(torch, dtype or config.dtype)  # a checkpoint of bfloat16 holds float32
    if module.peft_config is not None:
        if wanted == torch.float32:  # before the adapter is rounded
            model = model.to(wanted)
        model = merge(model)
    model = model.to(wanted)
    model.generation_config.eos_token_id = list(codec.stop_token_ids)
    model.generation_config.pad_token_id = codec.tokenizer.pad_token_id
    draw_bars_only_on_terminals()
    model.save_pretrained(folder)
    return int(model.num_parameters())


def _save_adapter(module: Any, folder: Path, config: Any, codec: Any, dtype: str | None) -> int:
    """The number of parameters."""
    import torch

    module.peft_config.base_model_name_or_path = _hub_id(config)
    state = module.get_state()
    wanted = None if dtype is None else getattr(torch, dtype)
    for name, content in adapter_files(module.peft_config, state, dtype=wanted).items():
        (folder / name).write_bytes(content)
    return sum(value.numel() for name, value in state.items() if name != BASE_MARK)


def _hub_id(config: Any) -> str | None:
    source = config.language_model_source
    return source if isinstance(source, str) and not is_local(source) else None


def _card(name: str, checkpoint: Path, config: Any, call_format: str, adapter: bool = False) -> str:
    source = config.language_model_source
    hub_id = _hub_id(config)
    base = hub_id or "the model that it was trained on"
    versions = ", ".join(
        f"{package} {metadata.version(package)}"
        for package in ("rllib-gtpo", "ray", "torch", "transformers", *["peft"] * adapter)
    )
    return _CARD.format(
        library="peft" if adapter else "transformers",
        tag=config.ALGORITHM.lower(),
        load=_LOAD_ADAPTER.format(base=base) if adapter else _LOAD_MODEL,
        base=f"base_model: {hub_id}\n" if hub_id else "",
        name=name,
        algorithm=config.ALGORITHM,
        facts="".join(f"- {fact}\n" for fact in _facts(checkpoint, hub_id, source)),
        settings="\n".join(f"| {key} | {getattr(config, key)} |" for key in _TRAINED_WITH),
        versions=versions,
        call_format=call_format,
        max_tokens=config.max_turn_tokens,
    )


def _facts(checkpoint: Path, hub_id: str | None, source: Any) -> Iterator[str]:
    of = hub_id or (Path(source).name if isinstance(source, str) else None)  # no path of a machine
    yield f"started from {of}" if of else "made from scratch"
    progress, record = checkpoint / "progress.json", checkpoint.parent / "run.json"
    if progress.is_file():
        found = json.loads(progress.read_text())
        yield f"{found['training_iteration']} iterations in {found['time_total_s']:.0f} s"
    accuracy = json.loads(record.read_text()).get("held_out_accuracy") if record.is_file() else None
    if accuracy:
        yield f"held-out accuracy {accuracy[0]:.3f} before and {accuracy[1]:.3f} after training"


def _push(directory: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=directory))
    except Exception as error:  # of the hub's client and of its HTTP library
        raise GTPOError(
            f"{directory} is complete, but uploading it failed: {error}. Log in with `hf auth "
            f"login`, and try `hf upload {repository} {directory}`."
        ) from error
