"""What the dense model attends to, measured a block of queries at a time: no scores of queries x keys exist at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from consa.attention import masks
from consa.methods.problem import Problem, Text
from consa.model import loss
from consa.model.attach import observed

QUERY_BLOCK = 256

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(probabilities, query, key)` -> a number per query head and query.

Probabilities are float32 `(q_heads, queries, keys)`, positions int64 `(queries, 1)` and `(keys,)`."""


def mean_over_queries(problem: Problem, text: Text, queries: range, measure: Measure) -> Tensor:
    """Mean of `measure` over the positions `queries` of a text, float64 `(num_layers, q_heads)`."""
    layout = problem.loaded.layout
    total = torch.zeros(layout.num_layers, layout.num_q_heads, dtype=torch.float64)

    def add(layer: int, q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> None:
        key = torch.arange(queries.stop, device=q.device)
        keys = k[0, :, None, : queries.stop].float()
        for block in (queries[i : i + QUERY_BLOCK] for i in range(0, len(queries), QUERY_BLOCK)):
            query = torch.arange(block.start, block.stop, device=q.device)[:, None]
            heads = q[0, :, block.start : block.stop].unflatten(0, (k.shape[1], -1)).float()
            scores = heads @ keys.transpose(-1, -2) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~masks.causal(query, key), float("-inf")).softmax(-1)
            total[layer] += measure(weights.flatten(0, 1), query, key).sum(-1).cpu()

    with torch.no_grad(), observed(problem.loaded.model, problem.dense, add):
        loss.hidden_states(problem.loaded.model, problem.tensor(text))
    problem.forward_tokens += len(text.tokens)
    return total / len(queries)


def per_unit(problem: Problem, per_head: Tensor) -> np.ndarray:
    """`(num_layers, q_heads)` to `(units,)`: a layer's mean; a KV head's largest, since one query head may need it."""
    chosen = per_head[list(problem.units.layers)]
    if problem.config.granularity == "layer":
        return chosen.mean(1).numpy()
    return chosen.unflatten(1, (problem.units.per_layer, -1)).amax(-1).flatten().numpy()
