"""The models that the scripts here start from: cold-started on the calculator, in any size.

A model that uses its tools is needed, for one with random weights calls none; and sizes at which
sampling costs what it costs in practice, which two cores cannot train in minutes.  So the tiny
model is trained, and then *widened*: more width, layers and heads whose contributions are zero.  It
computes what a model of that size computes, and says what the tiny one says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rllib_gtpo.models import TINY_QWEN2, load_model, load_tokenizer

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "gtpo_calculator.py"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
"""By name: 0.3, 25 and 106 million parameters."""
_WRITERS = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")


def save_cold_started(folder: Path, steps: int, seed: int = 0) -> None:
    """Trains the tiny model on the calculator's demonstrations, as the tuned example does.

    It is saved with its tokenizer as a Hugging Face directory.
    """
    from rllib_gtpo.command.files import load_experiment

    config = load_experiment(EXAMPLE).config
    config.cold_start = {**config.cold_start, "steps": steps}
    config.evaluation(evaluation_interval=None).debugging(seed=seed).reporting(progress=False)
    algorithm = config.build_algo()
    try:
        algorithm.run_cold_start_once()
        algorithm.env_runner.module.model.save_pretrained(folder)
        algorithm.env_runner.codec.tokenizer.save_pretrained(folder)
    finally:
        algorithm.stop()


def save_widened(source: Path, folder: Path, size: str) -> None:
    """Saves the model of `source` in a larger size, with its tokenizer."""
    narrow = load_model(source)
    load_tokenizer(source).save_pretrained(folder)
    widened(narrow, SIZES[size]).save_pretrained(folder)


@torch.no_grad()
def widened(narrow: Any, size: dict[str, int]) -> Any:
    """A Qwen2 of another size with the same logits (but for rounding).

    Rows and columns that are new read whatever they like and write nothing.  The mean that RMSNorm
    divides by is taken over more elements, of which the new ones are zero; its weights make up for
    that.
    """
    old = narrow.config
    heads = size["hidden_size"] // (old.hidden_size // old.num_attention_heads)
    per_group = old.num_attention_heads // old.num_key_value_heads
    shrink = old.hidden_size / size["hidden_size"]
    settings = {
        **TINY_QWEN2,
        **size,
        "vocab_size": old.vocab_size,
        "max_position_embeddings": old.max_position_embeddings,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // per_group,
        "rms_norm_eps": old.rms_norm_eps * shrink,
    }
    wide = load_model(settings)
    mine = wide.state_dict()
    for name, theirs in narrow.state_dict().items():
        if name.endswith(_WRITERS):
            mine[name].zero_()
        scale = shrink**0.5 if name.endswith("norm.weight") else 1.0
        mine[name][tuple(slice(n) for n in theirs.shape)] = theirs * scale
    for layer in wide.model.layers[old.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return wide
