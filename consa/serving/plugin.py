"""The entry point that vLLM calls in each of its processes before it reads configs.

Afterwards vLLM reads hybrids' configs and knows their architectures; nothing changes for other models. An engine that
cannot serve hybrids refuses them by the reason, instead of running them as what they are not.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from consa.errors import ConsaError
from consa.model import interface
from consa.model.register import ARCHITECTURE_PREFIX, HybridConfig
from consa.serving.limits import SERVED, engine_obstacle, hybrid_obstacle

WATERMARK = 0.02  # share of the pool's pages kept free when requests are admitted, unless the user gave a number
ARCHITECTURES = {ARCHITECTURE_PREFIX + name: name for name in SERVED}  # as `consa convert` names them


def register() -> None:
    """Make vLLM serve hybrids; may be called again."""
    if reason := engine_obstacle():
        AutoConfig.register(interface.NAME, _refusing(reason), exist_ok=True)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in ARCHITECTURES:
        # By name, since importing a model may touch the GPU, and this process may be about to fork.
        ModelRegistry.register_model(name, f"consa.serving.models:{name}")
        MODELS_CONFIG_MAP[name] = Verification


class Verification:
    """vLLM's hook between reading the settings and making the engine: refuses what would not be exact."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to do: what is to be checked depends on more than the model."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise a ConsaError unless the engine would compute the hybrid exactly, in the memory that it promises."""
        allocation = interface.allocation_of(vllm_config.model_config.hf_config)
        if allocation is None:
            raise ConsaError("the config holds no allocation; convert the model again with consa convert")
        parallel = vllm_config.parallel_config
        reason = hybrid_obstacle(
            ARCHITECTURES[vllm_config.model_config.architecture],
            allocation,
            tensor_parallel=parallel.tensor_parallel_size,
        )
        if reason:
            raise ConsaError(reason)
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ConsaError(
                "without the hybrid KV cache manager SWA heads would keep every token; leave"
                " --disable-hybrid-kv-cache-manager out"
            )
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name) != 1:
                raise ConsaError(f"{name} must be 1 for a hybrid, got {getattr(parallel, name)}")
        dtype = vllm_config.cache_config.cache_dtype
        if dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
            raise ConsaError(f"kv_cache_dtype must be auto for a hybrid, got {dtype}")
        if vllm_config.kv_transfer_config is not None:
            raise ConsaError("a hybrid takes no KV transfer; leave kv_transfer_config out")
        scheduler = vllm_config.scheduler_config
        # Many requests run, and all of them grow: without room for that, some would be computed twice.
        scheduler.watermark = scheduler.watermark or WATERMARK


def _refusing(reason: str) -> type[HybridConfig]:
    """A config that can be read by nobody, and says why."""

    class Refusing(HybridConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            raise ConsaError(f"vLLM cannot serve this hybrid: {reason}")

    return Refusing
