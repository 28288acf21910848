"""Rule-based allocations, exact for every feasible sparsity: the usual guesses, without learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from consa.allocation import NUM_SINK_TOKENS, WINDOW, Allocation, Granularity, num_full_units
from consa.errors import ConsaError

Rule = Callable[..., Allocation]
MAX_UNITS = 2**20  # a mistyped shape must not fill the memory


def interleaved(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA evenly spread over depth, each period starting with FA. Options as in `from_units`."""
    return from_units(lambda n, k, _: _spread(n, k), num_layers, num_kv_heads, rule="interleaved", **options)


def interleaved_late(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA evenly spread over depth, each period ending with FA."""
    return from_units(
        lambda n, k, _: n - 1 - _spread(n, k), num_layers, num_kv_heads, rule="interleaved_late", **options
    )


def bottom(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA in the layers nearest the input."""
    return from_units(lambda n, k, _: np.arange(k), num_layers, num_kv_heads, rule="bottom", **options)


def top(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA in the layers nearest the output."""
    return from_units(lambda n, k, _: np.arange(n - k, n), num_layers, num_kv_heads, rule="top", **options)


def middle(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA in one contiguous block in the middle."""
    return from_units(lambda n, k, _: np.arange(k) + (n - k) // 2, num_layers, num_kv_heads, rule="middle", **options)


def sandwich(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA at both ends, SWA between; the input side gets the odd unit."""

    def choose(n: int, k: int, _: int) -> np.ndarray:
        return np.r_[np.arange((k + 1) // 2), np.arange(n - k // 2, n)]

    return from_units(choose, num_layers, num_kv_heads, rule="sandwich", **options)


def random_units(num_layers: int, num_kv_heads: int, *, seed: int = 0, **options: Any) -> Allocation:
    """FA units drawn without replacement by numpy's PCG64 at `seed`.

    Raises:
        ConsaError: a negative seed.
    """
    if seed < 0:
        raise ConsaError(f"seed must be an integer >= 0, got {seed!r}")

    def choose(n: int, k: int, _: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(n)[:k]

    return from_units(choose, num_layers, num_kv_heads, rule="random_units", seed=seed, **options)


def uniform_heads(
    num_layers: int, num_kv_heads: int, *, granularity: Granularity = "kv_head", **options: Any
) -> Allocation:
    """The same number of FA heads in every layer (the first ones); a remainder is spread over depth.

    Raises:
        ConsaError: granularity is "layer", which allows no share of a layer's heads.
    """
    if granularity != "kv_head":
        raise ConsaError(f"uniform_heads needs granularity 'kv_head', got {granularity!r}")

    def choose(num_units: int, num_full: int, heads: int) -> np.ndarray:
        layers = num_units // heads
        per_layer = np.full(layers, num_full // layers)
        per_layer[_spread(layers, num_full % layers)] += 1
        return np.flatnonzero(np.arange(heads) < per_layer[:, None])

    return from_units(choose, num_layers, num_kv_heads, rule="uniform_heads", granularity="kv_head", **options)


def dense(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """FA everywhere: the original model. Options as in `from_units`, except the sparsity."""
    return from_units(lambda n, k, _: np.arange(k), num_layers, num_kv_heads, rule="dense", sparsity=0.0, **options)


def all_swa(num_layers: int, num_kv_heads: int, **options: Any) -> Allocation:
    """SWA everywhere. Options as in `from_units`, except the sparsity."""
    return from_units(lambda n, k, _: np.arange(k), num_layers, num_kv_heads, rule="all_swa", sparsity=1.0, **options)


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (interleaved, interleaved_late, bottom, top, middle, sandwich, uniform_heads, random_units)
}


DRAWN = {"random_units"}  # rules that use a seed


def names(granularity: Granularity) -> list[str]:
    """Names of the rules that exist for a granularity; `uniform_heads` needs "kv_head"."""
    return [name for name, rule in RULES.items() if rule is not uniform_heads or granularity == "kv_head"]


def by_name(name: str, num_layers: int, num_kv_heads: int, *, seed: int = 0, **options: Any) -> Allocation:
    """The allocation of a rule; only rules in `DRAWN` use `seed`. Other options as in `from_units`."""
    return RULES[name](num_layers, num_kv_heads, **options | ({"seed": seed} if name in DRAWN else {}))


def every_rule(
    num_layers: int, num_kv_heads: int, *, granularity: Granularity, **options: Any
) -> dict[str, Allocation]:
    """The allocation of every rule that exists for a granularity. Other options as in `by_name`."""
    return {
        name: by_name(name, num_layers, num_kv_heads, granularity=granularity, **options) for name in names(granularity)
    }


def from_units(
    choose: Callable[[int, int, int], np.ndarray],
    num_layers: int,
    num_kv_heads: int,
    *,
    rule: str,
    sparsity: float,
    granularity: Granularity = "layer",
    window: int = WINDOW,
    num_sink_tokens: int = NUM_SINK_TOKENS,
    native_windows: Mapping[int, int] | None = None,
    seed: int | None = None,
) -> Allocation:
    """Turn a choice of units, numbered layer by layer from the input, into an `Allocation`.

    Args:
        choose: `(num_units, num_full, units_per_layer)` -> indices of the FA units.
        num_layers: layers of the model.
        num_kv_heads: KV heads of each layer.
        rule: name for the provenance.
        sparsity: target share of units on SWA; rounded to the nearest feasible share.
        granularity: whether a unit is a layer or a KV head.
        window: tokens an SWA query sees, itself included.
        num_sink_tokens: first tokens visible on top of the window.
        native_windows: layers that already use a sliding window; they hold no units.
        seed: recorded in the provenance of a random choice.

    Raises:
        ConsaError: sparsity outside [0, 1], or a shape without units or with too many.
    """
    native_windows = dict(native_windows or {})
    if num_layers * num_kv_heads > MAX_UNITS:
        raise ConsaError(
            f"num_layers={num_layers}, num_kv_heads={num_kv_heads} make more than the allowed {MAX_UNITS} KV heads"
        )
    layers = [layer for layer in range(num_layers) if layer not in native_windows]
    if not layers or num_kv_heads < 1:
        raise ConsaError(f"num_layers={num_layers}, num_kv_heads={num_kv_heads} leave no units to allocate")
    per_layer = num_kv_heads if granularity == "kv_head" else 1
    num_units = len(layers) * per_layer
    full = np.zeros(num_units, dtype=bool)
    full[choose(num_units, num_full_units(num_units, sparsity), per_layer)] = True
    mask = np.zeros((num_layers, num_kv_heads), dtype=bool)
    mask[layers] = full.reshape(len(layers), per_layer)  # a layer's decision broadcasts over its KV heads
    provenance = {"method": rule, "target_sparsity": float(sparsity)} | ({} if seed is None else {"seed": seed})
    return Allocation(
        full_attention=mask,
        granularity=granularity,
        window=window,
        num_sink_tokens=num_sink_tokens,
        native_windows=native_windows,
        provenance=provenance,
    )


def _spread(num_places: int, count: int) -> np.ndarray:
    """`count` of `num_places` indices, spread as evenly as integers allow, starting with 0."""
    return np.arange(count) * num_places // max(count, 1)
