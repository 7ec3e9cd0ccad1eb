"""vLLM engines as Ray actors, shared by all env runners; see docs/vllm.md."""

from rllib_gtpo.engines.vllm.client import VLLMEngine
from rllib_gtpo.engines.vllm.handle import EnginePool
from rllib_gtpo.engines.vllm.settings import EngineSettings, check_vllm
from rllib_gtpo.engines.vllm.weights import pack_state

__all__ = ["EnginePool", "EngineSettings", "VLLMEngine", "check_vllm", "pack_state"]
