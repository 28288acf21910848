"""Checkpoints of a training loop: whole or absent, and continued only by the run that wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from consa.errors import ConsaError
from consa.files import read_text, write_atomically
from consa.provenance import first_difference

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
MAX_METRICS_BYTES = 2**30


class Checkpoint:
    """The checkpoint and metrics of the run in one folder.

    Args:
        folder: the run's folder; made when first written to.
        fingerprint: JSON-able; what must be equal for a run to be continued.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))

    def save(self, tensors: dict[str, Tensor], step: int, history: list[dict[str, float]]) -> None:
        """Replace what is there; `history` holds a record per step so far.

        Raises:
            ConsaError: the folder or the disk does not take it; the previous checkpoint is still whole.
        """
        # Metrics first: a kill between the two leaves more lines than steps, and `load` drops those.
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.folder / METRICS, lines.encode())
        metadata = {"step": str(step), "fingerprint": json.dumps(self.fingerprint)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata["sha256"] = _digest(tensors, metadata, history)
        write_atomically(self.folder / CHECKPOINT, safetensors.torch.save(tensors, metadata))

    def load(self) -> tuple[dict[str, Tensor], int, list[dict[str, float]]] | None:
        """What `save` was given last, or None if it never was.

        Raises:
            ConsaError: the folder holds a damaged checkpoint or that of a different run.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            step, fingerprint = int(metadata["step"]), json.loads(metadata["fingerprint"])
            history = [json.loads(line) for line in _lines(self.folder / METRICS)[:step]]
            if metadata.pop("sha256") != _digest(tensors, metadata, history):
                raise ValueError("not what was written")
        except (OSError, KeyError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            raise ConsaError(
                f"cannot continue from {path}: damaged ({error}); delete the folder to start over"
            ) from error
        difference = first_difference(fingerprint, self.fingerprint)
        if difference:
            raise ConsaError(
                f"{self.folder} holds a different run ({difference}); choose another folder, or delete it to start over"
            )
        return tensors, step, history


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str], history: list[dict[str, float]]) -> str:
    """Of all that a checkpoint holds: a flipped bit in a weight would be continued from without a word."""
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), history]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lines(path: Path) -> list[str]:
    return read_text(path, max_bytes=MAX_METRICS_BYTES).splitlines()
