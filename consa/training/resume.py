"""Checkpoints of a training loop: complete or absent, and only continued by the run that wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from consa.errors import ConsaError
from consa.files import read_sealed, read_text, write_atomically, write_sealed
from consa.provenance import first_difference

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.sealed"  # a safetensors file, followed by its SHA-256
OLD_CHECKPOINT = "checkpoint.safetensors"  # of consa before files were sealed; refused
MAX_METRICS_BYTES = 2**30


class Checkpoint:
    """The checkpoint and metrics of a run in its folder; a run only continues one of equal (JSON-able) fingerprint."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, object]) -> None:
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))

    def save(self, tensors: dict[str, Tensor], step: int, history: list[dict[str, float]]) -> None:
        """Replace the checkpoint; `history` has a record per step. If writing fails, the previous one is complete."""
        # Metrics first: a kill between the two leaves more lines than steps, and `load` drops those.
        lines = [json.dumps(record) for record in history]
        write_atomically(self.folder / METRICS, "".join(f"{line}\n" for line in lines).encode())
        record = {"step": step, "metrics": _digest(lines), "fingerprint": self.fingerprint}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(tensors, {"consa": json.dumps(record)})
        write_sealed(self.folder / CHECKPOINT, content)

    def load(self) -> tuple[dict[str, Tensor], int, list[dict[str, float]]] | None:
        """What the last `save` was given, or None; ConsaError if that is damaged or of another version or run."""
        path = self.folder / CHECKPOINT
        if not path.exists() and not (self.folder / OLD_CHECKPOINT).exists():
            return None
        content = read_sealed(path)
        if content is None:
            raise ConsaError(
                f"cannot continue from {path}: damaged, or written by another version of consa; delete the folder to"
                " start over"
            )
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["consa"])
        step: int = record["step"]
        lines = read_text(self.folder / METRICS, max_bytes=MAX_METRICS_BYTES).splitlines()[:step]
        if _digest(lines) != record["metrics"]:
            raise ConsaError(
                f"cannot continue from {path}: damaged (it does not match {METRICS}); delete the folder to start over"
            )
        tensors = safetensors.torch.load(content)
        difference = first_difference(record["fingerprint"], self.fingerprint)
        if difference:
            raise ConsaError(
                f"{self.folder} holds a different run ({difference}); choose another folder, or delete it to start over"
            )
        return tensors, step, [json.loads(line) for line in lines]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
