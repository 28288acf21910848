"""The noun: which KV heads of a model keep full attention. Needs numpy only, neither torch nor a model."""

# pyright: reportUnnecessaryIsInstance=false
# Values from users and files are checked against their annotations.

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from consa import picture, published
from consa.errors import ConsaError, InvalidAllocationError
from consa.files import JsonObject, read_text, write_atomically

SCHEMA = "consa.allocation/1"
Granularity = Literal["layer", "kv_head"]
MAX_FILE_BYTES = 64 * 2**20
WINDOW, NUM_SINK_TOKENS = 128, 4  # defaults, in tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocation:
    """An immutable record of which KV heads keep full attention (FA); all others use a sliding window (SWA).

    A query at position i of an SWA head sees key j when `i - window < j <= i` or `j < num_sink_tokens`; positions
    count from the first real token of a sequence.

    Attributes:
        full_attention: bool, `(num_layers, num_kv_heads)`, True where the KV head keeps full attention.
        granularity: "layer" if all KV heads of a layer share one decision, else "kv_head".
        window: keys visible to a query of an SWA head, itself included, in tokens.
        num_sink_tokens: first tokens of a sequence that stay visible on top of the window.
        native_windows: layer -> window in tokens, for layers that use a sliding window in the original model. They
            stay as they are: their rows are False, and they count neither as FA nor as SWA.
        scores: optional float64, same shape as `full_attention`; the scores behind the decision, higher keeps FA
            (the averaged log_alpha of a learned allocation).
        provenance: JSON-able record of the allocation's origin (model, method, target, seed, versions).

    Raises:
        InvalidAllocationError: a field is invalid or contradicts another; the message names it.
    """

    full_attention: np.ndarray
    granularity: Granularity = "kv_head"
    window: int
    num_sink_tokens: int = NUM_SINK_TOKENS
    native_windows: Mapping[int, int] = field(default_factory=dict[int, int])
    scores: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        try:
            mask = np.array(self.full_attention)  # a copy that nobody else can write to
        except ValueError as error:
            raise InvalidAllocationError(f"full_attention is not an array: {error}") from error
        _check(
            mask.ndim == 2 and 0 not in mask.shape and mask.dtype == np.bool_,
            f"full_attention must be a bool array (num_layers, num_kv_heads), got {mask.dtype} {mask.shape}",
        )
        kinds, granularity, window, sinks = get_args(Granularity), self.granularity, self.window, self.num_sink_tokens
        _check(granularity in kinds, f"granularity must be one of {', '.join(kinds)}, got {granularity!r}")
        _check(_is_int(window, 1), f"window must be an integer >= 1 (tokens), got {window!r}")
        _check(_is_int(sinks, 0), f"num_sink_tokens must be an integer >= 0 (tokens), got {sinks!r}")
        native, last = self.native_windows, len(mask) - 1
        _check(isinstance(native, Mapping), f"native_windows must map layers to windows, got {type(native).__name__}")
        for layer, size in native.items():
            _check(
                _is_int(layer, 0) and layer <= last and _is_int(size, 1),
                f"native_windows must map layers of 0..{last} to windows >= 1, got {layer!r}: {size!r}",
            )
            _check(
                not mask[layer].any(),
                f"full_attention gives FA to layer {layer}, which native_windows lists as sliding",
            )
        _check(len(native) < len(mask), "native_windows covers every layer; there is nothing to allocate")
        for layer in np.flatnonzero(mask.any(1) != mask.all(1)):
            mixes = f"full_attention mixes FA and SWA in layer {layer}"
            _check(granularity != "layer", f"{mixes}, which granularity 'layer' does not allow")
        scores = None if self.scores is None else _checked_scores(self.scores, mask.shape)
        mask.flags.writeable = False
        native_windows = {int(layer): int(native[layer]) for layer in sorted(native)}
        object.__setattr__(self, "full_attention", mask)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "window", int(window))
        object.__setattr__(self, "num_sink_tokens", int(sinks))
        object.__setattr__(self, "native_windows", native_windows)
        try:  # a round trip through JSON keeps exactly what `save` would write, and shares no object with the caller
            text = json.dumps(dict(self.provenance), indent=1, allow_nan=False)
            object.__setattr__(self, "provenance", json.loads(text, object_pairs_hook=_sorted_dict))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidAllocationError(f"provenance must be JSON-able: {error}") from error

    def __reduce__(self) -> Any:
        """Copies and unpickled allocations go through the constructor, so their arrays are read-only too."""
        return Allocation.from_json, (self.to_json(),)

    @property
    def num_layers(self) -> int:
        """Layers of the model, including those in `native_windows`."""
        return self.full_attention.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each layer."""
        return self.full_attention.shape[1]

    @property
    def layers(self) -> list[int]:
        """The layers that this allocation decides: all but `native_windows`."""
        return [layer for layer in range(self.num_layers) if layer not in self.native_windows]

    @property
    def margin(self) -> float | None:
        """Lowest score of an FA unit minus the highest of an SWA unit; None without scores, or units of one kind."""
        if self.scores is None:
            return None
        full, scores = self.full_attention[self.layers], self.scores[self.layers]
        return float(scores[full].min() - scores[~full].max()) if full.any() and not full.all() else None

    @property
    def sparsity(self) -> float:
        """Achieved share of the decided KV heads that use SWA, in [0, 1]."""
        num_units = len(self.layers) * self.num_kv_heads
        return (num_units - int(self.full_attention.sum())) / num_units  # one rounding: 9 of 30 is 0.3

    def kv_cache_bytes(self, seq_len: int, *, head_dim: int, bytes_per_element: int = 2, batch_size: int = 1) -> int:
        """Bytes of keys and values in the cache after `seq_len` tokens.

        An FA head keeps every token, an SWA head `min(seq_len, num_sink_tokens + window)`.
        """
        num_full = int(self.full_attention.sum())
        num_sliding = len(self.layers) * self.num_kv_heads - num_full
        tokens = num_full * seq_len + num_sliding * min(seq_len, self.num_sink_tokens + self.window)
        tokens += sum(self.num_kv_heads * min(seq_len, window) for window in self.native_windows.values())
        return 2 * tokens * head_dim * bytes_per_element * batch_size  # 2: keys and values

    def to_json(self) -> str:
        """The allocation as JSON; equal allocations give equal text."""
        record = {
            "schema": SCHEMA,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "granularity": self.granularity,
            "window": self.window,
            "num_sink_tokens": self.num_sink_tokens,
            "sparsity": self.sparsity,
            "full_attention": ["".join("01"[int(full)] for full in row) for row in self.full_attention],
            "native_windows": {str(layer): window for layer, window in self.native_windows.items()},
            "scores": None if self.scores is None else self.scores.tolist(),
            "provenance": self.provenance,
        }
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # Half of a surrogate pair, as in a file name that is not UTF-8, cannot be encoded: it stays escaped.
        return text.encode(errors="backslashreplace").decode()

    def decision(self) -> JsonObject:
        """JSON-able: every field that affects what a model computes, so neither scores nor provenance."""
        record = json.loads(self.to_json())
        return {name: value for name, value in record.items() if name not in ("scores", "provenance")}

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Parse the text of `to_json`.

        Raises:
            InvalidAllocationError: another schema, a missing or unknown field, or fields that contradict each other.
        """
        try:
            parsed: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidAllocationError(f"not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise InvalidAllocationError(f"schema {SCHEMA!r} is an object, got {type(parsed).__name__}")
        record = cast(JsonObject, parsed)
        if record.get("schema") != SCHEMA:
            raise InvalidAllocationError(f"schema must be {SCHEMA!r}, got {record.get('schema')!r}")
        expected = set(json.loads(_EMPTY.to_json()))
        if record.keys() != expected:
            missing = ", ".join(map(repr, sorted(expected - record.keys()))) or "none"
            unknown = ", ".join(map(repr, sorted(record.keys() - expected))) or "none"
            raise InvalidAllocationError(f"fields missing: {missing}; unknown: {unknown}")
        rows = cast(list[str], record["full_attention"])  # checked below
        shape = (record["num_layers"], record["num_kv_heads"])
        if (
            not isinstance(rows, list)
            or len(rows) != shape[0]
            or not all(isinstance(row, str) and len(row) == shape[1] and set(row) <= set("01") for row in rows)
        ):
            raise InvalidAllocationError(
                f"full_attention must be num_layers={shape[0]!r} strings of num_kv_heads={shape[1]!r} digits 0 or 1"
            )
        for name in ("native_windows", "provenance"):
            if not isinstance(record[name], dict):
                raise InvalidAllocationError(f"{name} must be an object, got {type(record[name]).__name__}")
        try:
            native_windows = {int(layer): window for layer, window in record["native_windows"].items()}
        except ValueError as error:
            raise InvalidAllocationError(f"native_windows must have layer numbers as keys: {error}") from error
        full_attention = np.array([[digit == "1" for digit in row] for row in rows], dtype=bool)
        same = {name: record[name] for name in ("granularity", "window", "num_sink_tokens", "scores", "provenance")}
        allocation = cls(full_attention=full_attention, native_windows=native_windows, **same)
        if record["sparsity"] != allocation.sparsity:
            raise InvalidAllocationError(
                f"sparsity is {record['sparsity']!r}, but full_attention has sparsity {allocation.sparsity!r}"
            )
        return allocation

    def save(self, path: str | Path) -> None:
        """Write the allocation as JSON, atomically."""
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read an allocation from a JSON file, a run's folder, or the published ones (`consa.published`).

        Raises:
            InvalidAllocationError: the file does not hold a valid allocation; the message names file and field.
            ConsaError: the file cannot be read.
        """
        file = published.resolve(path)
        if not os.path.exists(file):  # unlike Path.exists, accepts names that are too long
            known = ", ".join(published.alike(str(path)))
            raise ConsaError(f"allocation {str(path)!r} is neither a file nor a published allocation: {known}")
        text = read_text(file, max_bytes=MAX_FILE_BYTES)
        try:
            return cls.from_json(text)
        except InvalidAllocationError as error:
            raise InvalidAllocationError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        shape = f"{self.num_layers} layers x {self.num_kv_heads} KV heads"
        limits = f"window {self.window}, sinks {self.num_sink_tokens}"
        return f"Allocation({shape}, sparsity {self.sparsity:.3f}, {limits})"

    def _repr_html_(self) -> str:
        return picture.html(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


def num_full_units(num_units: int, sparsity: float) -> int:
    """The number of FA units whose share is nearest to `1 - sparsity`; a tie goes to the sparser one.

    Raises:
        ConsaError: `sparsity` outside [0, 1].
    """
    check_sparsity(sparsity)
    # Exact arithmetic on the decimal as typed: 0.7 of 30 units is 21, free of binary rounding.
    full = (1 - Fraction(repr(float(sparsity)))) * num_units
    return math.ceil(full - Fraction(1, 2))


def num_full_units_within(
    budget_bytes: int, seq_len: int, *, example: Allocation, head_dim: int, bytes_per_element: int = 2
) -> int:
    """The largest number of FA units whose KV cache for one sequence of `seq_len` tokens fits `budget_bytes`.

    Args:
        budget_bytes: memory for keys and values, in bytes.
        seq_len: tokens in the cache.
        example: any allocation of the model, for its shape, granularity, window and sinks.
        head_dim: elements per key of a head.
        bytes_per_element: 2 for bf16.

    Raises:
        ConsaError: the cache does not fit even with every unit on SWA; the message says how much it needs.
    """
    per_unit = example.num_kv_heads if example.granularity == "layer" else 1
    num_units = len(example.layers) * example.num_kv_heads // per_unit

    def bytes_with(full_units: int) -> int:
        mask, heads = np.zeros_like(example.full_attention), np.arange(num_units * per_unit)
        mask[example.layers] = heads.reshape(-1, example.num_kv_heads) < full_units * per_unit
        allocation = replace(example, full_attention=mask, granularity="kv_head", scores=None)
        return allocation.kv_cache_bytes(seq_len, head_dim=head_dim, bytes_per_element=bytes_per_element)

    floor = bytes_with(0)
    if floor > budget_bytes:
        raise ConsaError(
            f"KV budget of {budget_bytes} bytes is too small for {seq_len} tokens: with every unit on SWA the cache"
            f" takes {floor} bytes; raise the budget, or lower the context or the window"
        )
    per_full_unit = bytes_with(1) - floor
    return num_units if per_full_unit == 0 else min(num_units, (budget_bytes - floor) // per_full_unit)


def check_sparsity(sparsity: float) -> None:
    """Raise ConsaError unless `sparsity` is a number in [0, 1]."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
        raise ConsaError(f"sparsity must be a share in [0, 1], got {sparsity!r}; 0.75 puts three quarters on SWA")


def _sorted_dict(pairs: list[tuple[str, Any]]) -> JsonObject:
    return dict(sorted(pairs, key=lambda pair: pair[0]))


def _checked_scores(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        scores = np.array(values, dtype=np.float64)  # a copy too
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidAllocationError(f"scores are not numbers: {error}") from error
    if scores.shape != shape or not np.isfinite(scores).all():
        raise InvalidAllocationError(f"scores must be finite numbers of shape {shape}, got shape {scores.shape}")
    scores.flags.writeable = False
    return scores


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidAllocationError(message)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


# Source of the schema's field names.
_EMPTY = Allocation(full_attention=np.zeros((1, 1), dtype=bool), window=1)
