"""Layers that are computed twice, or compiled, are the same layers."""

from __future__ import annotations

import shutil

import pytest
import torch

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.language_model import switch_to_packed, trained_logprobs
from rllib_gtpo.layers import checkpoint_activations, compile_layers
from rllib_gtpo.models import TINY_QWEN2, load_model
from rllib_gtpo.packing import NOT_TRAINED, TokenSequence, collate


def tiny(layers=2):
    model = load_model({**TINY_QWEN2, "num_hidden_layers": layers})
    assert switch_to_packed(model)
    return model


def row(*lengths):
    sequences = [
        TokenSequence(
            [(5 * i + n) % 250 for i in range(n)], [NOT_TRAINED] + [0] * (n - 1), [0.0] * n
        )
        for n in lengths
    ]
    return collate(sequences, range(len(lengths)), packed=True)


def gradients(model, batch):
    model.zero_grad()
    logprobs, _ = trained_logprobs(model, batch)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def kept_bytes(model, batch):
    """Of the distinct tensors that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = trained_logprobs(model, batch)
    del logprobs
    return sum(size for size, _ in kept.values())


def test_recomputed_activations_give_the_same_gradients_of_packed_rows():
    batch = row(50, 3, 200, 50, 17)
    model = tiny()
    plain = gradients(model, batch)
    checkpoint_activations(model)
    again = gradients(model, batch)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert model.training is False


def test_recomputed_activations_are_not_kept():
    batch = row(*[256] * 8)
    model = tiny(layers=6)
    plain = kept_bytes(model, batch)
    checkpoint_activations(model)
    assert kept_bytes(model, batch) < 0.35 * plain


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients_of_rows_of_any_length():
    from torch._dynamo.utils import counters

    batches = [row(50, 3, 200), row(7, 90), row(*range(5, 30)), row(64)]
    model = tiny()
    plain = [gradients(model, batch) for batch in batches]
    compile_layers(model, torch.device("cpu"))
    checkpoint_activations(model)
    counters.clear()
    graphs = []  # compiled so far
    for batch, expected in zip(batches, plain, strict=True):
        found = gradients(model, batch)
        graphs.append(counters["stats"]["unique_graphs"])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]  # nothing is compiled anew for a length


def test_compiling_without_a_compiler_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="install g\\+\\+"):
        compile_layers(tiny(), torch.device("cpu"))
