"""Methods that observe the dense model: where its heads attend, or what closing one unit costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention import masks
from consa.methods import ObservingMethod
from consa.methods.problem import Problem, Text
from consa.model import loss
from consa.model.attach import attached
from consa.settings import option

QUERY_BLOCK = 256  # queries measured at once, to bound the memory of the scores

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(probabilities, query, key)` -> a number per query head and query.

Probabilities are float32 `(q_heads, queries, keys)`, positions int64 `(queries, 1)` and `(keys,)`."""


@dataclass(frozen=True, kw_only=True)
class AttentionMass(ObservingMethod):
    """The units with the largest share of their attention beyond window and sinks keep full attention."""

    name = "attention_mass"

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        window, num_sink_tokens = problem.config.window, problem.config.num_sink_tokens

        def hidden(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (weights * ~masks.sliding(query, key, window, num_sink_tokens)).sum(-1)

        texts = problem.sample(self.evaluation_sequences)
        mass = [mean_over_queries(problem, text, range(len(text.tokens)), hidden) for text in texts]
        return problem.decide(self, mean_per_unit(problem, mass))


@dataclass(frozen=True, kw_only=True)
class LazyLayers(ObservingMethod):
    """The units of lowest lazy ratio keep full attention; scores are what the ratio leaves of 1.

    LightTransfer (arXiv 2410.13846) calls layers lazy whose last queries attend to 4 sinks and 1,020 recent tokens
    alone; here KV heads too, with the sinks and window that are asked for. The default of `last_queries` is that of
    yuyijiong/sliding-window-attention-adaptation, which repeats the paper.
    """

    name = "lazy_layers"
    last_queries: int = option(64, "Last queries of a sequence whose attention is measured.", ge=1)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        window, num_sink_tokens = problem.config.window, problem.config.num_sink_tokens
        length = problem.sequences.shape[1]
        last = range(max(0, length - self.last_queries), length)

        def not_lazy(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return 1 - (weights * masks.sliding(query, key, window, num_sink_tokens)).sum(-1)

        texts = problem.sample(self.evaluation_sequences)
        ratios = [mean_over_queries(problem, text, last, not_lazy) for text in texts]
        return problem.decide(self, mean_per_unit(problem, ratios))


@dataclass(frozen=True, kw_only=True)
class RetrievalScore(ObservingMethod):
    """The units that copy most of the answers out of the prompt keep full attention.

    The score is how often a head looks most at the very token that is to come next: in Wu et al. (arXiv 2404.15574)
    over tokens as the model generates them, here over those of the right answer. The text is generated: of the
    problem's sequences only the length counts.
    """

    name = "retrieval_score"

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""

        def score(text: Text) -> Tensor:
            tokens = problem.tensor(text)[0]

            def copies(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
                best = weights.argmax(-1)  # (q_heads, queries)
                return (tokens[best] == tokens[query[:, 0] + 1]) & (best < text.start)

            return mean_over_queries(problem, text, range(text.start - 1, len(tokens) - 1), copies)

        scores = [score(text) for text in problem.questions(self.evaluation_sequences)]
        return problem.decide(self, problem.without_ties(mean_per_unit(problem, scores)))


@dataclass(frozen=True, kw_only=True)
class NLLGuided(ObservingMethod):
    """Close every unit alone; those that raise the loss of the answers most keep full attention.

    In the paper (arXiv 2606.27791) units are layers and the answers are to long prompts; here KV heads too, on
    questions of `consa.data.questions`: of the sequences only the length counts. One evaluation per unit and one more.
    """

    name = "nll_guided"

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        questions = problem.questions(self.evaluation_sequences)
        count = problem.units.count
        dense = problem.loss(np.ones(count, dtype=bool), questions)
        rise = [problem.loss(np.arange(count) != unit, questions) - dense for unit in range(count)]
        return problem.decide(self, np.array(rise))


def mean_over_queries(problem: Problem, text: Text, queries: range, measure: Measure) -> Tensor:
    """Mean of `measure` over the positions `queries` of a text in the dense model, float64 `(num_layers, q_heads)`."""
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

    with torch.no_grad(), attached(problem.loaded.model, problem.dense, observer=add):
        loss.hidden_states(problem.loaded.model, problem.tensor(text))
    problem.forward_tokens += len(text.tokens)
    return total / len(queries)


def mean_per_unit(problem: Problem, per_head: list[Tensor]) -> np.ndarray:
    """The mean over texts of `(num_layers, q_heads)`, as `(units,)`.

    A layer counts as its mean, a KV head as the largest of its query heads, since one of them may need it.
    """
    chosen = torch.stack(per_head).mean(0)[list(problem.units.layers)]
    if problem.config.granularity == "layer":
        return chosen.mean(1).numpy()
    return chosen.unflatten(1, (problem.units.per_layer, -1)).amax(-1).flatten().numpy()
