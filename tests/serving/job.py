"""A process of its own that generates with vLLM: JSON of folder, engine options and prompts in, JSON of tokens out.

For what would outlast its engine in the process of the tests: vLLM's transformers backend changes transformers, a rank
of several binds its threads to a core, and kernels are compiled or interpreted from the import of triton on.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.serving.engine import engine, generate, groups


def interpret_kernels() -> list[str]:
    """Let attention run on the CPU by the kernels, interpreted; a list to which each of their launches is added.

    Also lets vLLM's newer model runner work there, which needs Triton and so a driver of it that calls itself active.
    """
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
    from vllm.v1.attention.backends import fa_utils

    from consa.serving import attention, kernels
    from tests.serving import kernel_cases

    kernel_cases.patch_interpreter()
    launches: list[str] = []

    def counted(name: str, run: Any) -> Any:
        return lambda *args, **options: launches.append(name) or run(*args, **options)

    kernels.write = counted("write", kernels.write)
    kernels.attention = counted("attention", kernels.attention)
    fa_utils.flash_attn_varlen_func = counted("flash", kernel_cases.flash_attention)
    attention._flash_version = lambda head_size: 3
    attention.HybridImpl._by_torch = attention.HybridImpl._by_kernels
    return launches


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    os.environ |= job["environment"]
    launches = interpret_kernels() if "TRITON_INTERPRET" in os.environ else []
    with engine(Path(job["folder"]), **job["options"]) as llm:
        found: dict[str, Any] = {"tokens": generate(llm, job["prompts"], job["num_tokens"])}
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            found["groups"] = groups(llm)
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            found["runner"] = type(worker.model_runner).__module__
    print(json.dumps(found | {"launches": Counter(launches)}), flush=True)
