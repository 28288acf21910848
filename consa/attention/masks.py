"""The semantics: which keys a query sees. Works on ints, numpy arrays and tensors.

Positions count from the first real token of a sequence, so padding has no position and each sequence its own sinks.
"""

from __future__ import annotations

from typing import Any


def causal(query: Any, key: Any) -> Any:
    """Full attention: the key is not in the query's future."""
    return key <= query


def in_window(query: Any, key: Any, window: int) -> Any:
    """The key is among the last `window` keys up to and including the query's own."""
    return (key <= query) & (key > query - window)


def beyond_window_sink(query: Any, key: Any, window: int, num_sink_tokens: int) -> Any:
    """The key is a sink token outside the window."""
    return (key < num_sink_tokens) & (key <= query - window)


def sliding(query: Any, key: Any, window: int, num_sink_tokens: int) -> Any:
    """Sliding-window attention: the key is in the window or is a sink token, and not in the future."""
    return in_window(query, key, window) | beyond_window_sink(query, key, window, num_sink_tokens)
