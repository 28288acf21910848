"""The record of what a model's KV heads attend to, and its file; numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consa.errors import ConsaError
from consa.files import write_atomically

SCHEMA = "consa.behaviour/1"
MEASURES = {  # name -> meaning; shares are of attention mass, means are over queries and query heads
    "sink_share": "share of attention on the sink tokens",
    "beyond_window_share": "share of attention beyond the window, sinks left out",
    "mean_span": "mean distance of the keys attended to, tokens",
    "effective_span": "effective number of keys attended to, exp(entropy)",
    "entropy": "entropy of attention, nats",
    "previous_token": "attention to the previous token",
    "induction": "attention to the tokens that followed earlier occurrences of the current token",
    "copy": "attention to earlier occurrences of the current token",
    "induction_repeated": "induction on a repeated random sequence",
    "copy_repeated": "copying on a repeated random sequence",
    "needle": "attention to the needle while answering",
    "causal_effect": "increase of the loss when only this head slides, nats per token",
}
OPTIONAL = {"needle", "causal_effect"}
UNBOUNDED = {"mean_span", "effective_span", "entropy", "causal_effect"}  # the others are shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What each KV head of a model attends to on some text.

    Attributes:
        measures: name of `MEASURES` -> float32 `(num_layers, num_kv_heads)`; those of `OPTIONAL` may be missing.
        by_distance: float32 `(num_layers, num_kv_heads, num_buckets)`, share of attention by distance between query
            and key: 0, 1, 2-3, 4-7, and so on in powers of two.
        window: tokens a sliding-window query sees, itself included.
        num_sink_tokens: first tokens of a sequence that count as sinks.
        provenance: JSON-able record of model, text and versions.

    Raises:
        ConsaError: a field is inconsistent; the message names it.
    """

    measures: Mapping[str, np.ndarray]
    by_distance: np.ndarray
    window: int
    num_sink_tokens: int
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        missing = MEASURES.keys() - OPTIONAL - self.measures.keys()
        unknown = self.measures.keys() - MEASURES.keys()
        if missing or unknown:
            raise ConsaError(
                f"measures missing: {', '.join(sorted(missing)) or 'none'};"
                f" unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        if self.by_distance.ndim != 3 or 0 in self.by_distance.shape:
            raise ConsaError(
                f"by_distance must be (num_layers, num_kv_heads, num_buckets), got {self.by_distance.shape}"
            )
        for name, values in {"by_distance": self.by_distance, **self.measures}.items():
            shape = self.by_distance.shape[: 3 if name == "by_distance" else 2]
            if values.shape != shape or values.dtype != np.float32:
                raise ConsaError(f"{name} must be finite float32 {shape}, got {values.dtype} {values.shape}")
            if not np.isfinite(values).all():
                raise ConsaError(f"{name} holds numbers that are not finite")
            if name not in UNBOUNDED and not (values.min() > -1e-3 and values.max() < 1 + 1e-3):
                raise ConsaError(f"{name} must hold shares in [0, 1], got {values.min():g} to {values.max():g}")
        total = self.by_distance.sum(-1)
        if abs(total - 1).max() > 1e-3:
            raise ConsaError(f"by_distance must add up to 1 per head, got {total.min():g} to {total.max():g}")
        for name, least in (("window", 1), ("num_sink_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConsaError(f"{name} must be an integer >= {least} (tokens), got {value!r}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically."""
        from safetensors.numpy import save

        record = {"schema": SCHEMA, "window": self.window, "num_sink_tokens": self.num_sink_tokens}
        record["provenance"] = dict(self.provenance)
        tensors = {"by_distance": self.by_distance, **self.measures}
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        write_atomically(Path(path), save(tensors, {"consa": json.dumps(record, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Behaviour:
        """Read what `save` wrote.

        Raises:
            ConsaError: the file cannot be read or is inconsistent; the message names file and field.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            record = json.loads(metadata.get("consa", "{}"))
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise ConsaError(f"its metadata does not say schema {SCHEMA!r}; write it with consa behaviour")
            if "by_distance" not in tensors:
                raise ConsaError("by_distance is missing")
            return cls(
                by_distance=tensors.pop("by_distance"),
                measures=tensors,
                window=record["window"],
                num_sink_tokens=record["num_sink_tokens"],
                provenance=record["provenance"],
            )
        except ConsaError as error:
            raise ConsaError(f"{path}: {error}") from error
        except KeyError as error:
            raise ConsaError(f"{path}: {error.args[0]} is missing in its metadata") from error
        except (SafetensorError, ValueError, TypeError) as error:
            raise ConsaError(f"{path} is damaged or no safetensors file: {error}") from error
        except OSError as error:
            reason = error.strerror or "no such file"  # safetensors gives no strerror
            raise ConsaError(f"cannot read {path}: {reason}") from error
