"""Measure what each head attends to, in one pass over text and in blocks of queries: no S x S matrix is made.

Shape suffixes: H KV heads, G query heads per KV head, Q queries of a block, K keys up to its last query, D head_dim.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consa import rules
from consa.allocation import NUM_SINK_TOKENS, Allocation
from consa.attention import masks
from consa.behaviour.record import Behaviour
from consa.data.prompts import for_prompts
from consa.data.questions import examples
from consa.errors import ConsaError
from consa.model import loss
from consa.model.attach import attached
from consa.model.layout import attention_layout, max_positions
from consa.provenance import environment

MAX_BLOCK_SCORES = 2**22  # scores of one layer that exist at once; 16 MiB fit a CPU's caches
GPU_BLOCKS = 16  # times as many on a GPU, which is faster with fewer and larger steps
REPEATED_TOKENS = 256  # length of the random sequence that is repeated
NUM_NEEDLES = 4
NEEDLE_TOKENS = 2048  # length of the text that hides a needle, if the model has as many positions


def measure(
    model: PreTrainedModel,
    sequences: np.ndarray,
    *,
    window: int,
    num_sink_tokens: int = NUM_SINK_TOKENS,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    causal_sequences: int = 0,
    identity: Mapping[str, Any] | None = None,
    on_pass: Callable[[int, str], None] | None = None,
) -> Behaviour:
    """Measure what each KV head attends to under full attention: means over its query heads and over queries.

    Layers with a native window keep it.

    Args:
        model: a causal language model; it does not change.
        sequences: int tokens `(num_sequences, seq_len)`, the text to measure on.
        window: tokens a sliding-window query would see, itself included.
        num_sink_tokens: first tokens of a sequence that count as sinks.
        seed: of the random sequence and the needles.
        tokenizer: of the model, for the needle score; without it that score is missing.
        causal_sequences: number of sequences, from the first on, to measure each head's causal effect on, which costs
            a forward pass over them for each KV head; 0 leaves that measure out.
        identity: of the model, for the record.
        on_pass: called after each of `num_passes` passes with their number so far and the name of the last one.

    Raises:
        ConsaError: the window covers the sequences, or there are fewer sequences than asked for.
    """
    layout = attention_layout(model)
    seq_len = sequences.shape[1]
    if not 1 <= window < seq_len:
        raise ConsaError(f"window must lie between 1 and the sequence length ({seq_len}) - 1, got {window}")
    if num_sink_tokens < 0:
        raise ConsaError(f"num_sink_tokens must be an integer >= 0, got {num_sink_tokens}")
    if not 0 <= causal_sequences <= len(sequences):
        raise ConsaError(f"causal_sequences must lie in 0..{len(sequences)}, got {causal_sequences}")
    longest = max_positions(model.config) or sys.maxsize
    if seq_len > longest:
        raise ConsaError(f"seq_len must be at most the {longest} positions of the model, got {seq_len}")
    needles = _needles(tokenizer, min(longest, NEEDLE_TOKENS), seed) if tokenizer is not None else []
    limits: dict[str, Any] = {"window": window, "num_sink_tokens": num_sink_tokens}
    own = layout.native_windows
    dense = rules.dense(*layout.shape, granularity="kv_head", native_windows=own, **limits)
    passes = count(1)

    def tell(text: str) -> None:
        if on_pass:
            on_pass(next(passes), text)

    on_text, on_repeated, on_needles = (_Means(layout.shape) for _ in range(3))

    def observe(tokens: np.ndarray, observer: Any, text: str) -> None:
        with torch.no_grad(), attached(model, dense, observer=observer):
            loss.hidden_states(model, _batch(model, tokens))
        tell(text)

    for tokens in sequences:
        observe(tokens, _TextObserver(tokens, dense, on_text), "text")
    repeated = _repeated_sequence(model.config.get_text_config().vocab_size, seed)
    observe(repeated, _TextObserver(repeated, dense, on_repeated), "repeated sequence")
    for tokens, queries, keys in needles:
        observe(tokens, _NeedleObserver(queries, keys, dense, on_needles), "needle")

    of_text = on_text.means()
    measures = {name: mean for name, mean in of_text.items() if not name.startswith("distance")}
    measures |= {f"{name}_repeated": on_repeated.means()[name] for name in ("induction", "copy")}
    measures |= on_needles.means()
    if causal_sequences:
        measures["causal_effect"] = _causal_effect(model, sequences[:causal_sequences], dense, tell)
    buckets = [of_text[f"distance {k}"] for k in range(len(_bucket_edges(seq_len)) - 1)]
    provenance = dict(identity or {}) | {
        "tokens": hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest(),
        "num_sequences": len(sequences),
        "seq_len": seq_len,
        "seed": seed,
        "causal_sequences": causal_sequences,
        **environment(),
    }
    return Behaviour(
        measures={name: values.astype(np.float32) for name, values in measures.items()},
        by_distance=np.stack(buckets, axis=-1).astype(np.float32),
        **limits,
        provenance=provenance,
    )


def num_passes(model: PreTrainedModel, num_sequences: int, *, needles: bool, causal: bool) -> int:
    """Number of passes that `measure` makes."""
    layout = attention_layout(model)
    units = (layout.num_layers - len(layout.native_windows)) * layout.num_kv_heads
    return num_sequences + 1 + NUM_NEEDLES * needles + (1 + units) * causal


class _Means:
    """Sums by name, float64 `(num_layers, num_kv_heads)`, and the counts that make means of them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(shape))
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(shape))

    def add(self, name: str, layer: int, total: Tensor, count: int) -> None:
        """Add `total`, `(num_kv_heads,)`, the sum over `count` queries of one layer."""
        self._sums[name][layer] += total.double().cpu().numpy()
        self._counts[name][layer] += count

    def means(self) -> dict[str, np.ndarray]:
        return {name: total / np.maximum(self._counts[name], 1) for name, total in self._sums.items()}


@dataclass(frozen=True)
class _TextObserver:
    """Measures every query of a sequence."""

    tokens: np.ndarray
    dense: Allocation
    means: _Means

    def __call__(self, layer: int, q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> None:
        native_window = self.dense.native_windows.get(layer)
        at_once = MAX_BLOCK_SCORES * (1 if q.device.type == "cpu" else GPU_BLOCKS)
        size = max(1, at_once // (q.shape[1] * k.shape[2]))
        for start in range(0, q.shape[2], size):
            queries = torch.arange(start, min(start + size, q.shape[2]), device=q.device)
            log_p = _log_attention(q, k, queries, scaling, softcap, native_window)  # (H,G,Q,K)
            p = log_p.exp()
            self._add(layer, queries, p.mean(1), -log_p.mul_(p).sum(-1))

    def _add(self, layer: int, queries: Tensor, p: Tensor, entropy: Tensor) -> None:
        """Add a block: its attention averaged over query heads, `(H,Q,K)`, and entropies, `(H,G,Q)`."""
        count, end = len(queries), p.shape[2]
        window, sinks = self.dense.window, self.dense.num_sink_tokens

        def add(name: str, total: Tensor, count: int = count) -> None:
            self.means.add(name, layer, total, count)

        by_distance = _sum_by_distance(p)  # (H,K)
        sink = torch.arange(min(sinks, end), device=p.device)
        far_sink = masks.beyond_window_sink(queries[:, None], sink, window, sinks)
        add("sink_share", p[:, :, :sinks].sum((1, 2)))
        beyond = by_distance[:, window:].sum(1) - (p[:, :, :sinks] * far_sink).sum((1, 2))
        add("beyond_window_share", beyond.clamp_min(0))  # a difference of sums may be less by rounding
        add("mean_span", by_distance @ torch.arange(end, device=p.device, dtype=p.dtype))
        add("effective_span", entropy.exp().mean(1).sum(1))
        add("entropy", entropy.mean(1).sum(1))
        add("previous_token", by_distance[:, 1:2].sum(1), count - int(queries[0] == 0))
        for bucket, (first, last) in enumerate(pairwise(_bucket_edges(len(self.tokens)))):
            add(f"distance {bucket}", by_distance[:, first:last].sum(1))

        tokens = torch.from_numpy(self.tokens[:end].astype(np.int64)).to(p.device)
        same = tokens[queries, None] == tokens
        same &= torch.arange(end, device=p.device) < queries[:, None]
        query, key = same.nonzero(as_tuple=True)
        occurred = len(query.unique())
        add("copy", p[:, query, key].sum(1), occurred)
        add("induction", p[:, query, key + 1].sum(1), occurred)


@dataclass(frozen=True)
class _NeedleObserver:
    """Measures the attention of queries that predict an answer to the place where the text states it."""

    queries: Tensor
    keys: Tensor
    dense: Allocation
    means: _Means

    def __call__(self, layer: int, q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> None:
        queries, native_window = self.queries.to(q.device), self.dense.native_windows.get(layer)
        p = _log_attention(q, k, queries, scaling, softcap, native_window).exp()
        self.means.add("needle", layer, p[..., self.keys.to(q.device)].sum((2, 3)).mean(1), len(queries))


def _log_attention(
    q: Tensor, k: Tensor, queries: Tensor, scaling: float, softcap: float | None, native_window: int | None
) -> Tensor:
    """Log of the attention of some queries of one sequence, float32 `(H,G,Q,K)`; very negative for invisible keys.

    `q` is `(1, q_heads, seq, head_dim)`, `k` `(1, kv_heads, seq, head_dim)`, `queries` `(Q,)` ascending positions.
    """
    end = int(queries[-1]) + 1
    k = k[0, :, :end].float()
    q = q[0, :, queries].float().unflatten(0, (len(k), -1)) * scaling
    scores = (q.flatten(1, 2) @ k.mT).unflatten(1, q.shape[1:3])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    first = 0 if native_window else int(queries[0])  # all see the keys before it
    visible = masks.in_window(queries[:, None], torch.arange(first, end, device=q.device), native_window or end)
    scores[..., first:].masked_fill_(~visible, -1e30)  # finite, so that 0 * log 0 is 0
    return scores.log_softmax(-1)


def _sum_by_distance(p: Tensor) -> Tensor:
    """Sum over the queries of a block by the distance of the key: `(H,Q,K)` to `(H,K)`; the last query is on key K - 1.

    Pad Q - 1 columns on the left and read rows that are one element longer: equal distances are then in one column.
    """
    H, Q, K = p.shape
    padded = F.pad(p, (Q - 1, 0))
    length = padded.shape[2]
    return padded.as_strided((H, Q, K), (Q * length, length + 1, 1)).sum(1).flip(1)


def _bucket_edges(seq_len: int) -> list[int]:
    """First distance of each bucket, then the end of the last one: 0, 1, 2, 4, 8, ..."""
    return [0, *(2**k for k in range(seq_len.bit_length()) if 2**k < seq_len), seq_len]


def _batch(model: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)


def _repeated_sequence(vocab_size: int, seed: int) -> np.ndarray:
    """Distinct random tokens: one that serves as the sink, then the others twice."""
    drawn = np.random.default_rng(seed).permutation(vocab_size)[: REPEATED_TOKENS + 1]
    return np.concatenate([drawn, drawn[1:]])


def _needles(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """Tokens of a text with its answer, positions that predict the answer, and positions where the text states it."""
    needles = []
    tokenizer = for_prompts(tokenizer)
    for example in examples("single", tokenizer, length=length, count=NUM_NEEDLES, seed=seed):
        (answer,) = example.answers
        text = f"{example.prompt} {answer}"
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        begins, ends = np.array(encoded["offset_mapping"]).T
        stated, asked = (
            torch.from_numpy(np.flatnonzero((begins < first + len(answer)) & (ends > first)))
            for first in (text.index(answer), text.rindex(answer))
        )
        needles.append((np.array(encoded["input_ids"]), asked - 1, stated))
    return needles


def _causal_effect(
    model: PreTrainedModel, sequences: np.ndarray, dense: Allocation, tell: Callable[[str], None]
) -> np.ndarray:
    """Increase of the mean loss when one KV head slides, over the positions after the window; `(L,H)`."""

    def mean_loss(full: np.ndarray) -> float:
        with attached(model, replace(dense, full_attention=full)):
            losses = [loss.token_losses(model, _batch(model, tokens)) for tokens in sequences]
        tell("causal effect")
        return float(torch.cat(losses)[:, dense.window :].double().mean())

    base = mean_loss(dense.full_attention)
    effect = np.zeros(dense.full_attention.shape)
    for layer, head in zip(*dense.full_attention.nonzero(), strict=True):
        full = dense.full_attention.copy()
        full[layer, head] = False
        effect[layer, head] = mean_loss(full) - base
    return effect
