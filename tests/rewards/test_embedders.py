"""Embedders by name and settings: what is made, and what is refused with which hint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.embedders.python_tokens import PythonTokens
from rllib_gtpo.rewards.embedders.titan import Titan


def test_by_name_and_with_settings(tmp_path):
    assert build_embedder("python_tokens") == PythonTokens()
    assert build_embedder({"name": "python_tokens", "ngrams": 2}) == PythonTokens(ngrams=2)
    cached = build_embedder({"name": "titan", "dimensions": 256, "cache": str(tmp_path)})
    assert cached.embedder == Titan(dimensions=256)
    assert cached.identity == Titan(dimensions=256).identity != Titan().identity


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ("python_token", "'python_token' is unknown; did you mean 'python_tokens'"),
        ("", "unknown"),
        (None, "embedder=None: give a name"),
        (3, "embedder=3: give a name"),
        ({}, "give a name"),
        ({"model": "titan"}, "give a name"),
        ({"name": ["titan"]}, "unknown"),
        ({"name": "titan", "dimension": 512}, "no setting 'dimension'; did you mean 'dimensions'"),
        ({"name": "titan", "dimensions": 100}, "dimensions=100 must be one of 1024, 512, 256"),
        ({"name": "titan", "concurrency": 0}, "concurrency=0 must be a whole number"),
        ({"name": "titan", "attempts": 1.5}, r"attempts=1\.5 must be a whole number"),
        ({"name": "titan", "attempts": True}, "attempts=True must be a whole number"),
        ({"name": "titan", "timeout_s": 0}, "timeout_s=0 must be above 0"),
        ({"name": "titan", "timeout_s": "1"}, "timeout_s='1' must be above 0"),
        ({"name": "titan", "cache": 1}, "cache=1: give a directory"),
        ({"name": "python_tokens", "cache": "x"}, "no setting 'cache'"),
        ({"name": "python_tokens", "ngrams": 0}, "ngrams=0 must be a whole number"),
        ("huggingface", "'huggingface' needs a model"),
        ({"name": "huggingface", "model": "/no/such"}, "no such directory"),
        ({"name": "huggingface", "model": "a/b", "batch_size": 0}, "batch_size=0 must be"),
        ({"name": "huggingface", "model": "a/b", "max_tokens": -1}, "max_tokens=-1 must be"),
        ({"name": "huggingface", "model": "a/b", "max_tokens": 0}, "max_tokens=0 must be"),
    ],
)
def test_refused_where_it_is_set(settings, match):
    with pytest.raises(ConfigError, match=match):
        GTPOConfig().rewards(shaping="mean", embedder=settings).validate()


def test_settings_without_effect():
    with pytest.raises(ConfigError, match="embedder has no effect unless shaping is set"):
        GTPOConfig().rewards(embedder="titan").validate()


def test_shaping_is_for_training_only():
    config = GTPOConfig().rewards(shaping="max", shaping_alpha=0.3)
    assert config.build_shaping().mode == "max" and config.build_shaping().alpha == 0.3
    assert config.get_evaluation_config_object().build_shaping() is None
    assert GTPOConfig().build_shaping() is None


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = """
import sys
from rllib_gtpo.rewards.embedders import build_embedder
for settings in ("titan", "python_tokens", {"name": "huggingface", "model": "x"}):
    build_embedder(settings)
print([m for m in ("torch", "ray", "sklearn", "boto3", "transformers") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
