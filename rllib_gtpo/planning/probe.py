"""What the cost model needs to know of a model's code and of this machine, measured in seconds.

A model of the same shape with one layer, and one with two, do a real forward and backward pass and
some decode steps; what a layer adds is the difference.  Their vocabulary is cut, since it costs
memory and its time is proportional.  Autograd itself is asked what it keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rllib_gtpo.engines.kv_cache import BatchCache
from rllib_gtpo.engines.model_runner import ModelRunner
from rllib_gtpo.engines.rows import Part
from rllib_gtpo.engines.vllm.settings import kv_bytes_per_token
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.language_model import hidden_states
from rllib_gtpo.models import TINY_QWEN2, load_config, load_model
from rllib_gtpo.ops.logprobs import selected_logprobs
from rllib_gtpo.packing import TokenBatch, TokenSequence, collate
from rllib_gtpo.planning.cost import ModelCost, Speed

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

_VOCABULARY = 8192
_FLOPS = 5e10  # of a timed pass: less than a second of a few cores
_REPEATS = 3
_DECODE_CONTEXT = 64


@dataclass(frozen=True)
class Measured:
    """What the probe found."""

    model: ModelCost
    speed: Speed
    device: str


@dataclass(frozen=True)
class _Depth:
    """A model with so few layers: elements, bytes that autograd keeps of a token, seconds."""

    parameters: int
    trained: int
    saved: float
    train: float
    step: float
    decode: float


def warm_up() -> None:
    """Loads what any worker with a model loads, by making a tiny one and a pass over it."""
    model = load_model(TINY_QWEN2)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()


def measure(
    config: GTPOConfig, rows: int, learner_threads: int | None, sampler_threads: int | None
) -> Measured:
    """Probes the model of a checked config on this machine.

    Args:
        config: Its model is not loaded; only what describes it.
        rows: How many trajectories an engine samples at one time.
        learner_threads, sampler_threads: Of torch, in those workers; None: as here.
    """
    full = load_config(config.language_model_source, config.tokenizer)
    text = full.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if not layers or text is not full:
        raise ConfigError(
            f"rllib plan knows decoders with num_hidden_layers; {type(full).__name__} is none."
        )
    rows = min(rows, 64)
    vocabulary = int(text.vocab_size)
    cut = min(vocabulary, _VOCABULARY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for depth in (1, 2):
        module = _module(config, _shape(full, depth, cut)).to(device)
        packed = module.pack()
        found[depth] = _look(module, packed, rows, learner_threads, sampler_threads)
        if depth == 1:
            head_train, head_decode = _head_seconds(module, rows, learner_threads)
            head = module.model.get_output_embeddings().weight
            embedding = module.model.get_input_embeddings().weight
            tied = embedding is head
            mine = [p for p in module.parameters() if p.requires_grad]
            largest, trained_element = max((p.numel(), p.element_size()) for p in mine)
            element, width = head.element_size(), head.shape[1]
            trained_heads = sum(w.requires_grad for w in ([head] if tied else [head, embedding]))
            head_is_trained = head.requires_grad
        del module
    one, two = found[1], found[2]
    missing = (vocabulary - cut) * width
    layer = two.parameters - one.parameters
    trained_layer = two.trained - one.trained
    root = one.parameters - layer + missing * (1 if tied else 2)
    trained_root = one.trained - trained_layer + missing * trained_heads
    more = vocabulary / cut - 1.0
    model = ModelCost(
        parameters=root + layers * layer,
        trained=trained_root + layers * trained_layer,
        largest=max(largest, vocabulary * width if trained_heads else 0),
        layer=layer,
        root=root,
        head=vocabulary * width if head_is_trained else 0,
        layers=layers,
        vocabulary=vocabulary,
        element=element,
        trained_element=trained_element,
        saved_layer=max(0.0, two.saved - one.saved),
        saved_rest=max(0.0, 2 * one.saved - two.saved) + width * element,  # the head's input
        boundary=float(width * element),
        kv=float(kv_bytes_per_token(full, config.dtype) or 0),
    )

    def whole(name: str, head_seconds: float) -> float:
        first, second = getattr(one, name), getattr(two, name)
        return max(first, first + (layers - 1) * (second - first)) + more * head_seconds

    speed = Speed(
        train=whole("train", head_train),
        step=whole("step", head_decode / rows),
        decode=whole("decode", head_decode),
        rows=rows,
    )
    return Measured(model, speed, device)


def _shape(full: Any, layers: int, vocabulary: int) -> dict[str, Any]:
    """The settings of a model from scratch: as `full`, with fewer layers and tokens."""
    settings = dict(full.to_dict())
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version"):
        settings.pop(name, None)
    if settings.get("layer_types"):
        settings["layer_types"] = (settings["layer_types"] * 2)[:layers]
    ends = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
    return {**settings, **ends, "num_hidden_layers": layers, "vocab_size": vocabulary}


def _module(config: GTPOConfig, model: dict[str, Any]) -> Any:
    spec = config.get_default_rl_module_spec()
    settings = {**spec.model_config, "model": model, "tokenizer": None}
    return spec.module_class(model_config=settings)


def _look(
    module: Any,
    packed: bool,
    rows: int,
    learner_threads: int | None,
    sampler_threads: int | None,
) -> _Depth:
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    batch = _batch(module, parameters, packed)

    def passes() -> None:
        output = module.forward_train({"tokens": batch})
        output["logprobs"].sum().backward()
        module.zero_grad(set_to_none=True)

    saved = _saved_bytes(module, batch) / batch.num_tokens
    with _threads(learner_threads):
        train = _fastest(passes) / batch.num_tokens
    with _threads(sampler_threads):
        step, decode = (_decode_seconds(module, count) for count in (1, rows))
    return _Depth(parameters, trained, saved, train, step, decode)


def _batch(module: Any, parameters: int, packed: bool) -> TokenBatch:
    tokens = int(min(512, max(32, _FLOPS / (6 * parameters))))
    length = min(tokens // 2, module.max_context)
    ids = [i % module.vocab_size for i in range(length)]
    sequence = TokenSequence(ids, [-1, *[0] * (length - 1)], [0.0] * length)
    return collate([sequence] * 2, [0, 1], packed=packed).to(module.model.device)


def _saved_bytes(module: Any, batch: TokenBatch) -> float:
    """Of one forward pass up to the head, without parameters; each piece of memory once."""
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # else its address might be given away, and counted once for two
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = hidden_states(module.model, batch)
    del hidden
    return float(sum(sizes.values()))


def _decode_seconds(module: Any, rows: int) -> float:
    """A step with so many rows, each with a short context."""
    context = min(_DECODE_CONTEXT, module.max_context - _REPEATS - 1)
    cache = BatchCache(rows, module.max_context, rows * module.max_context)
    runner = ModelRunner(module.model, cache, 4096)
    length = context
    with runner.inference(rows):
        cache.reserve(rows, context + _REPEATS + 1, 0, module.max_context)
        runner.compute([Part.of(0, [np.zeros(context, dtype=np.int64)] * rows, [0] * rows)])

        def step() -> None:
            nonlocal length
            runner.compute([Part.one_each([0] * rows, [length] * rows)])
            length += 1

        return _fastest(step)


def _head_seconds(module: Any, rows: int, threads: int | None) -> tuple[float, float]:
    """Of the head with the cut vocabulary: a trained token's, and those of a decode step."""
    weight = module.model.get_output_embeddings().weight.detach().requires_grad_()
    hidden = weight.detach()[:64].clone().requires_grad_()
    targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)

    def train() -> None:
        logprobs, _ = selected_logprobs(hidden, weight, targets, with_entropy=True)
        logprobs.sum().backward()
        weight.grad = hidden.grad = None

    def decode() -> None:
        with torch.inference_mode():
            hidden[:rows] @ weight.T

    with _threads(threads):
        return _fastest(train) / len(hidden), _fastest(decode)


def optimizer_ratio(config: GTPOConfig) -> float:
    """Bytes of the optimizer's state for each byte of a large parameter: asked of itself."""
    parameter = torch.nn.Parameter(torch.zeros(256, 256))
    parameter.grad = torch.ones_like(parameter)
    optimizer = config.build_optimizer([parameter])
    optimizer.step()
    kept = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
    return sum(v.nbytes for v in kept if v.dim()) / parameter.nbytes


def _fastest(call: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls; the first one warms up."""
    seconds = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
