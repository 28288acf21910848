"""What `consa serve` runs: vLLM's OpenAI-compatible server, with what a converted folder needs."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

from consa.errors import ConsaError
from consa.model.convert import verify
from consa.model.register import ARCHITECTURE_PREFIX
from consa.serving.limits import NATIVE_PLAIN, engine_obstacle, hybrid_obstacle

IMPLEMENTATION = "--model-impl"


def command(folder: Path, options: list[str]) -> list[str]:
    """The command line that serves a converted folder.

    Args:
        folder: what `consa convert` wrote, of either kind.
        options: for `vllm serve`; they win over what is chosen here, save where the result would not be exact.

    Returns:
        Program and arguments.

    Raises:
        ConsaError: the folder is damaged, vLLM is missing or of another version, or it cannot serve the allocation
            exactly; the message says why.
    """
    kind, allocation = verify(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ranks = _value(options, "--tensor-parallel-size", "-tp") or ""
    chosen: list[str] = []
    if reason := engine_obstacle(plugin=kind == "hybrid"):
        raise ConsaError(f"cannot serve {folder}: {reason}")
    if kind == "hybrid":
        architecture = config["architectures"][0].removeprefix(ARCHITECTURE_PREFIX)
        if reason := hybrid_obstacle(
            architecture, allocation, tensor_parallel=int(ranks) if ranks.isdecimal() and int(ranks) else 1
        ):
            raise ConsaError(f"cannot serve {folder}: {reason}")
    elif config["model_type"] != NATIVE_PLAIN:  # its own class would not slide its layers
        given = _value(options, IMPLEMENTATION)
        if given not in (None, "transformers"):
            raise ConsaError(
                f"cannot serve {folder}: vLLM's own {config['model_type']} does not slide single layers;"
                f" leave {IMPLEMENTATION} {given} out"
            )
        chosen += [IMPLEMENTATION, "transformers"] if given is None else []
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *chosen, *options]


def _value(options: list[str], *names: str) -> str | None:
    """What was given last for an option of vLLM's, as `--name value` or `--name=value`; None if it was not."""
    found = None
    for option, following in pairwise([*options, ""]):
        name, equals, value = option.partition("=")
        if name.replace("_", "-") in names:
            found = value if equals else following
    return found
