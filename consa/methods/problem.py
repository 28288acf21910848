"""What every method works on: the units of a model, text to evaluate them on, and a count of the tokens used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count, groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consa.allocation import Allocation, num_full_units
from consa.config import ChoiceConfig
from consa.data import questions
from consa.data.prompts import for_prompts
from consa.errors import ConsaError
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import LoadedModel
from consa.provenance import versions
from consa.training.gates import Units
from consa.training.learning import asked_of, units_of
from consa.training.objective import Batch, Objective
from consa.training.retrieval import with_retrieval

QUESTIONS = "multi_query"
"""The retrieval task of the methods that need answers: several numbers are hidden, and all are asked for."""


@dataclass(frozen=True)
class Text:
    """A sequence and where in it prediction counts."""

    tokens: np.ndarray  # int (seq_len,)
    start: int = 1  # index of the first token that is to be predicted: the answer's first one in a question
    weights: Tensor | None = None  # float32 (seq_len - 1,), factors on the losses; 1 if None


@dataclass
class Problem:
    """One choice to make; ConsaError if there is no text to choose by."""

    loaded: LoadedModel  # the model, which is left as it is
    sequences: np.ndarray  # int tokens (num_sequences, seq_len)
    config: ChoiceConfig  # what is asked for
    units: Units = field(init=False)  # what there is to decide
    num_full: int = field(init=False)  # how many of them keep full attention
    forward_tokens: int = 0  # sent through the model so far
    backward_tokens: int = 0  # of them, those whose gradient was sent back

    def __post_init__(self) -> None:
        if self.sequences.ndim != 2 or len(self.sequences) == 0 or self.sequences.shape[1] < 2:
            raise ConsaError(
                f"no text to choose by: got sequences of shape {self.sequences.shape}; give more or longer documents"
            )
        self.units = units_of(self.loaded.layout, self.config.granularity)
        self.num_full = num_full_units(self.units.count, self.config.sparsity)

    @property
    def target_sparsity(self) -> float:
        """The feasible sparsity nearest to the config's."""
        return 1 - self.num_full / self.units.count

    def stream(self) -> Iterator[Text]:
        """The sequences without end: each once per epoch, every epoch in its own order."""
        for epoch in count():
            for place in np.random.default_rng([self.config.seed, epoch]).permutation(len(self.sequences)):
                yield Text(self.sequences[place])

    def sample(self, number: int, retrieval: float = 0.0) -> list[Text]:
        """The first `number` sequences of the stream, or all there are: those of an evaluation.

        With a share of `retrieval` they hold puzzles, and tokens weigh as in learning.
        """
        objective = with_retrieval(Objective(), retrieval, self.loaded.tokenizer)
        drawn = objective.drawn(self.sequences, self.config.seed, range(min(number, len(self.sequences))))
        return [
            Text(one.tokens[0].numpy(), weights=None if one.weights is None else one.weights[0])
            for one in drawn.split(1)
        ]

    def questions(self, number: int, length: int | None = None) -> list[Text]:
        """Questions about what lies in a text of `length` tokens (by default as long as the sequences), answered."""
        tokenizer = for_prompts(self.loaded.tokenizer)
        texts = []
        for example in questions.examples(
            QUESTIONS, tokenizer, length=length or self.sequences.shape[1], count=number, seed=self.config.seed
        ):
            prompt = tokenizer(example.prompt)["input_ids"]
            answer = tokenizer(" " + ", ".join(example.answers), add_special_tokens=False)["input_ids"]
            texts.append(Text(np.array(prompt + answer), len(prompt)))
        return texts

    def tensor(self, *texts: Text) -> Tensor:
        """The tokens of texts of one length, int64 `(texts, seq_len)` on the model's device."""
        tokens = np.stack([text.tokens for text in texts]).astype(np.int64)
        return torch.from_numpy(tokens).to(self.loaded.model.device)

    def together(self, texts: list[Text]) -> Batch:
        """The texts of a sample, on the model's device."""
        weights = [text.weights for text in texts if text.weights is not None]
        return Batch(self.tensor(*texts), torch.stack(weights) if weights else None)

    def batches(self, texts: list[Text]) -> Iterator[list[Text]]:
        """Neighbours of one length, as many as are computed at once."""
        for _, alike in groupby(texts, key=lambda text: len(text.tokens)):
            while batch := list(islice(alike, self.config.micro_batch)):
                yield batch

    def allocation(self, full: np.ndarray, **more: Any) -> Allocation:
        """The allocation in which the units of `full`, bool `(units,)`, keep full attention."""
        per_head = self.units.spread(torch.from_numpy(full).float(), elsewhere=0).bool().numpy()
        return Allocation(full_attention=per_head, **asked_of(self.config, self.loaded.layout), **more)

    @property
    def dense(self) -> Allocation:
        """Every unit on full attention."""
        return self.allocation(np.ones(self.units.count, dtype=bool))

    def loss(self, full: np.ndarray, texts: list[Text]) -> float:
        """Mean loss per predicted token of `texts` with the units of `full` on full attention, nats."""
        total = 0.0
        with attached(self.loaded.model, self.allocation(full)):
            for batch in self.batches(texts):
                losses = loss.token_losses(self.loaded.model, self.tensor(*batch))
                for text, own in zip(batch, losses, strict=True):
                    weighted = own.double() if text.weights is None else own.double() * text.weights.to(own.device)
                    total += float(weighted[text.start - 1 :].sum())
                    self.forward_tokens += len(text.tokens)
        return total / sum(len(text.tokens) - text.start for text in texts)

    def without_ties(self, scores: np.ndarray) -> np.ndarray:
        """Scores with up to 1e-6 added at random, as DuoAttention does, so that ties do not favour lower layers."""
        return scores + np.random.default_rng(self.config.seed).uniform(0, 1e-6, len(scores))

    def top(self, scores: np.ndarray) -> np.ndarray:
        """The `num_full` units of highest score, bool `(units,)`; ties go to the lower layer and head."""
        full = np.zeros(self.units.count, dtype=bool)
        full[np.argsort(-scores, kind="stable")[: self.num_full]] = True
        return full

    def gather(self, per_head: np.ndarray) -> np.ndarray:
        """`(num_layers, num_kv_heads)` to `(units,)`."""
        heads = self.units.num_kv_heads // self.units.per_layer
        return per_head[list(self.units.layers), ::heads].flatten()

    def decide(self, method: Any, scores: np.ndarray, full: np.ndarray | None = None, **settings: Any) -> Allocation:
        """The allocation that a method ends with; its provenance has the method's settings and cost.

        Args:
            method: the `consa.methods.Method`.
            scores: `(units,)`, higher keeps full attention.
            full: the decision, bool `(units,)`; by default the `num_full` units of highest score.
            settings: what else the provenance is to say of the method.
        """
        full = self.top(scores) if full is None else full
        assert full.sum() == self.num_full
        provenance = self.loaded.identity | {
            "method": method.name,
            "target_sparsity": self.target_sparsity,
            "config": asdict(self.config),
            "settings": asdict(method) | settings,
            "cost": cost(self.forward_tokens, self.backward_tokens),
            "versions": versions(),
        }
        per_head = self.units.spread(torch.from_numpy(scores).double(), elsewhere=0).numpy()
        return self.allocation(full, scores=per_head, provenance=provenance)

    def cut(self, ranked: Allocation) -> Allocation:
        """The allocation of this sparsity by the scores of one that a ranking method chose for another sparsity."""
        assert ranked.scores is not None
        provenance = {"target_sparsity": self.target_sparsity, "config": asdict(self.config)}
        full = self.allocation(self.top(self.gather(ranked.scores))).full_attention
        return replace(ranked, full_attention=full, provenance={**ranked.provenance, **provenance})


def cost(forward_tokens: int, backward_tokens: int) -> dict[str, int]:
    """The cost of a choice for its provenance, in tokens: the same on every machine, unlike seconds."""
    return {"forward_tokens": forward_tokens, "backward_tokens": backward_tokens}
