"""How vLLM engines are set up: from our settings, to vLLM's arguments.  No ray, no vLLM here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_gtpo.engines.vllm.install import engine_argument_names, installed_version
from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.lora import LoRASettings
from rllib_gtpo.models import architecture_of, load_config, load_model, max_positions
from rllib_gtpo.placement import SHARED, Bundles, check_shared

if TYPE_CHECKING:
    from rllib_gtpo.config import GTPOConfig

SHARED_MEMORY = "rllib_gtpo_shared_memory"  # our way of weight transfer, in vLLM's registry
BACKENDS = (SHARED_MEMORY, "nccl", "ipc")
_OURS = {
    "model": "set it with language_model(model=...)",
    "tokenizer": "engines see tokens only",
    "max_model_len": "set it with rollouts(max_tokens=...)",
    "seed": "each request has a seed of its own",
    "logprobs_mode": "training needs those of the sampling distribution",
    "skip_tokenizer_init": "engines see tokens only",
    "worker_extension_cls": "it is what loads the weights",
    "weight_transfer_config": "set weight_transfer to one of " + ", ".join(BACKENDS),
    "generation_config": "sampling is set with rollouts(...)",
    "distributed_executor_backend": "each engine is one actor with its workers in it",
    "enable_sleep_mode": "set rollouts(placement='shared')",
}
VERSIONS_OF_ADAPTER = 2  # the newest, and the one that requests in flight may have
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has slots for
_CPU_KV_BYTES = 256 << 20
_CPU_BATCHED_TOKENS = 4096


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made of.

    options: The user's engine_config.  truncates: whether requests may have a top_p below 1.
    lora: Of the policy, whose model the engines then load or make themselves, from `seed`.
    learner_share: What a learner takes of the device that it has in turns with an engine; None if
        engines have devices of their own.
    bundles: Where engines are started, each in the placement group's bundle of its number.
    """

    model: Any
    tokenizer: Any
    dtype: str
    max_context: int
    num_engines: int
    cpu: bool
    truncates: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    lora: LoRASettings | None = None
    seed: int = 0
    learner_share: float | None = None
    bundles: Bundles | None = None

    @classmethod
    def of(cls, config: GTPOConfig) -> EngineSettings:
        """Reads a checked config; looks at the model's own config for its longest context."""
        own = max_positions(load_config(config.language_model_source, config.tokenizer))
        return cls(
            model=config.language_model_source,
            tokenizer=config.tokenizer,
            dtype=config.dtype,
            max_context=min(config.max_tokens or own, own),
            num_engines=config.num_engines,
            cpu=installed_version()[1],
            truncates=config.top_p < 1.0,
            options=dict(config.engine_config),
            lora=LoRASettings.of(config.lora),
            seed=config.seed or 0,
            learner_share=config.num_gpus_per_learner if config.placement == SHARED else None,
        )

    @property
    def weight_transfer(self) -> str:
        """One of BACKENDS."""
        return str(self.options.get("weight_transfer", SHARED_MEMORY))

    @property
    def workers(self) -> int:
        """Processes, and on a GPU build devices, of one engine."""
        return _workers(self.options)

    @property
    def adapters(self) -> int:
        """LoRA adapters that may be in use at once."""
        if self.lora is not None:
            return 1
        return int(self.options.get("max_loras", 1)) if self.options.get("enable_lora") else 0

    def resources(self) -> dict[str, float]:
        """What one engine takes of a Ray cluster; CPU engines share the cores with everyone."""
        if self.cpu:
            return {"CPU": 0}
        if self.learner_share is not None:
            return {"CPU": 1, "GPU": round(1 - self.learner_share, 4)}
        return {"CPU": 1, "GPU": self.workers}

    def place(self, index: int) -> dict[str, Any]:
        """Ray's options that say where an engine starts."""
        return {} if self.bundles is None else self.bundles.options(index)

    def environment(self) -> dict[str, str]:
        """Environment variables of the engine's actor."""
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self.cpu:
            # More threads that are not bound to cores are many times slower than one.
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        if self.truncates:
            variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # see worker.WholeDistribution
        if self.weight_transfer == "ipc":
            variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickled
        for name in ("HF_HUB_OFFLINE", "HF_HOME"):
            if name in os.environ:
                variables[name] = os.environ[name]
        return variables

    def arguments(self, scratch: Path) -> dict[str, Any]:
        """The keyword arguments of AsyncEngineArgs.

        scratch: A directory of this node, for the config of a model that has none.
        """
        config = load_config(self.model, self.tokenizer)
        arguments: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.max_context,
            "max_num_seqs": 256,
            "disable_log_stats": True,
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "worker_extension_cls": "rllib_gtpo.engines.vllm.worker.WorkerExtension",
        }
        if isinstance(self.model, Mapping):
            arguments["model"] = str(scratch)
            if self.lora is None:  # the learners' weights come before anything is sampled
                config.architectures = [architecture_of(config)]
                config.save_pretrained(scratch)
                arguments["load_format"] = "dummy"
            else:
                made = {"dtype": self.dtype, "seed": self.seed, "tokenizer": self.tokenizer}
                load_model(self.model, **made).save_pretrained(scratch)
        else:
            path = Path(self.model).expanduser()
            arguments["model"] = str(path if path.exists() else self.model)
        if self.cpu:
            arguments |= {
                "distributed_executor_backend": "uni" if self.workers == 1 else "mp",
                "enforce_eager": True,
                "block_size": 32,
                "kv_cache_memory_bytes": _CPU_KV_BYTES,
                # A prompt that is cut in two takes back a draw of its request's random numbers,
                # which those of a CPU cannot: the engine would die.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, self.max_context),
            }
        elif self.learner_share is not None:
            share = round(1 - self.learner_share, 4)
            arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": share}
        own = {k: v for k, v in self.options.items() if k != "weight_transfer"}
        arguments |= own
        if self.lora is not None:
            rank = next(r for r in LORA_RANKS if r >= self.lora.rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank}
        if self.adapters:
            # One slot stays free: with all taken, vLLM lets requests without an adapter use one.
            arguments["max_loras"] = self.adapters * VERSIONS_OF_ADAPTER + 1
        self._check_cache(config, arguments)
        return arguments

    def _check_cache(self, config: Any, arguments: dict[str, Any]) -> None:
        """Refuses a cache that cannot hold one context: vLLM says so only in its own log."""
        size = arguments.get("kv_cache_memory_bytes")
        per_token = kv_bytes_per_token(config, str(arguments["dtype"]))
        if size is None or per_token is None:
            return
        needed = per_token * (self.max_context + arguments.get("block_size", 16))
        if int(size) * self.workers < needed:
            raise ConfigError(
                f"engine_config kv_cache_memory_bytes={size} cannot hold one context of "
                f"{self.max_context} tokens, which takes {needed} bytes: raise it, or lower "
                "rollouts(max_tokens=...)."
            )


def kv_bytes_per_token(config: Any, dtype: str) -> int | None:
    """What a token takes in the cache of keys and values; None where that cannot be told."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    hidden = getattr(config, "hidden_size", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not (heads and layers and hidden) or kinds != {"full_attention"}:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return int(2 * layers * kv_heads * head_dim * (4 if dtype == "float32" else 2))


def check_vllm(config: GTPOConfig) -> None:
    """Raises ConfigError for settings that vLLM engines cannot honour."""
    _, cpu = installed_version()
    if config.deterministic:
        raise ConfigError(
            "deterministic=True is not possible with engine='vllm': its sums depend on which "
            "requests share a batch, and with them, now and then, a token. Use engine='hf', or "
            "leave it out; each request still has a seed of its own."
        )
    options = config.engine_config
    known = engine_argument_names()
    for name in options:
        if name in _OURS:
            raise ConfigError(f"engine_config has {name!r}: {_OURS[name]}.")
        if name != "weight_transfer" and name not in known:
            guess = did_you_mean(name, sorted({*known, "weight_transfer"} - _OURS.keys()))
            raise ConfigError(f"engine_config has {name!r}, which vLLM does not know{guess}")
    backend = options.get("weight_transfer", SHARED_MEMORY)
    if backend not in BACKENDS:
        raise ConfigError(
            f"engine_config weight_transfer={backend!r} is unknown{did_you_mean(backend, BACKENDS)}"
        )
    if cpu and options.get("enable_chunked_prefill"):
        raise ConfigError(
            "engine_config enable_chunked_prefill=True: a CPU build of vLLM dies when it cuts the "
            "prompt of a request that has a seed, as all have here; leave it out."
        )
    if cpu and backend != SHARED_MEMORY:
        raise ConfigError(
            f"engine_config weight_transfer={backend!r} needs GPUs, and vLLM is a CPU build: leave "
            "it out."
        )
    if backend != SHARED_MEMORY and config.strategy == "deepspeed":
        raise ConfigError(
            f"engine_config weight_transfer={backend!r} cannot read the parts that "
            "strategy='deepspeed' keeps: leave it out, or use strategy='fsdp2'."
        )
    if config.lora is not None:
        _check_lora(config, backend)
    if config.placement == SHARED:
        check_shared(config, _workers(options), cpu=cpu)
    if (backend == "ipc") > (config.placement == SHARED):
        raise ConfigError(
            "engine_config weight_transfer='ipc' is for learners and engines on the same devices: "
            "set rollouts(placement='shared'), or use 'nccl'."
        )
    if backend == "nccl" and config.placement == SHARED:
        raise ConfigError(
            "engine_config weight_transfer='nccl' does not work within one device: leave it out, "
            "or use 'ipc'."
        )


def _check_lora(config: GTPOConfig, backend: str) -> None:
    """What the policy's adapter decides or needs."""
    lora = LoRASettings.of(config.lora)
    for name in ("enable_lora", "max_loras", "max_lora_rank"):
        if name in config.engine_config:
            raise ConfigError(f"engine_config has {name!r}: language_model(lora=...) decides it.")
    if backend != SHARED_MEMORY:
        raise ConfigError(
            f"engine_config weight_transfer={backend!r} has no effect with lora, whose adapter "
            "reaches the engines as files: leave it out."
        )
    if lora is not None and lora.rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"lora.rank={lora.rank}: vLLM serves at most {LORA_RANKS[-1]}; lower it, or use "
            "engine='hf'."
        )


def _workers(options: Mapping[str, Any]) -> int:
    tensor, pipeline = (options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    return int(tensor) * int(pipeline)
