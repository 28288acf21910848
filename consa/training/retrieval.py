"""Retrieval in the objective: facts are hidden in the user's own text, and a share of the loss asks for them."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from consa.data import questions
from consa.data.questions import Puzzle
from consa.errors import ConsaError
from consa.training.objective import Batch, Dense, LossOfChunk, Objective

FAMILIES = ("multi_key", "multi_query")
"""Families of `consa.data.questions` that are trained on. Both name what they ask for, so that several puzzles in one
sequence do not contradict each other. The other families are left to judge the allocation by."""

TOKENS_PER_PUZZLE = 1024
MAX_PUZZLES = 6
"""Puzzles in one sequence: one per `TOKENS_PER_PUZZLE` tokens, at least one. Six take over half of the things."""

_TEXT, _PUZZLE, _ANSWER = range(3)


def with_retrieval(base: Objective, share: float, tokenizer: Any) -> Objective:
    """`base` with this share of retrieval, or as it is for 0; ConsaError if the tokenizer that it needs is None."""
    if not share:
        return base
    if tokenizer is None:
        raise ConsaError("retrieval needs the model's tokenizer, because questions are text; give it, or 0 retrieval")
    return Retrieval(share, tokenizer, base)


class Retrieval(Objective):
    """Every sequence holds puzzles; their answers make up a share of its loss, and the user's text the rest.

    Openings, hidden sentences and questions do not count. Every sequence weighs the same, but for weights of `base`.

    Args:
        share: of the answers in the loss, in [0, 1].
        tokenizer: the model's own, for the puzzles.
        base: what is minimised on the tokens that count; by default the next-token loss. Its weights hold for the text.
    """

    def __init__(self, share: float, tokenizer: Any, base: Objective | None = None) -> None:
        self._share = share
        self._tokenizer = tokenizer
        self._base = base or Objective()
        self.factors, self.needs_dense = self._base.factors, self._base.needs_dense

    def drawn(self, sequences: np.ndarray, seed: int, places: range) -> Batch:
        """See `Objective.drawn`."""
        text = self._base.drawn(sequences, seed, places)
        of_text = torch.ones(text.tokens[:, 1:].shape) if text.weights is None else text.weights
        weights = torch.empty_like(of_text)
        for row, place in enumerate(places):
            rng = random.Random(f"retrieval {seed} {place}")
            tokens, is_answer, is_text = self.puzzles_in(text.tokens[row].numpy(), rng)
            text.tokens[row] = torch.from_numpy(tokens)
            answers, rest = (torch.from_numpy(part[1:]).float() for part in (is_answer, is_text))
            scale = rest.mean()
            rest[is_text[1:]] = of_text[row, : is_text[1:].sum()]  # the base's weights move along with the text
            weights[row] = self._share * answers / answers.mean() + (1 - self._share) * rest / scale
        return Batch(text.tokens, weights)

    def losses(self, batch: Batch, dense: Dense | None) -> LossOfChunk:
        """See `Objective.losses`."""
        return self._base.losses(batch, dense)

    def puzzles_in(self, text: np.ndarray, rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A text with puzzles in it, which tokens are answers, and which the text's: int64 and bool, as long as it.

        The first token stays where it is, and the end of the text makes room. Each puzzle has its own random places,
        in order: for its opening, each hidden sentence, and the question with its answer.
        """
        drawn: list[tuple[float, list[int], int]] = []  # place from 0 to 1, tokens, how many at the end are answers
        for puzzle in _without_conflicts(rng, min(MAX_PUZZLES, max(1, len(text) // TOKENS_PER_PUZZLE))):
            parts = [self._ids(f"\n{part}\n") for part in (puzzle.opening, *puzzle.hidden)]
            answer = self._ids(" " + ", ".join(puzzle.answers))
            parts.append([*self._ids(f"\n{puzzle.question}"), *answer])
            counts = [0] * (len(parts) - 1) + [len(answer)]
            drawn += zip(sorted(rng.random() for _ in parts), parts, counts, strict=True)
        room = len(text) - sum(len(part) for _, part, _ in drawn)
        if room < 1:
            raise ConsaError(
                f"retrieval needs sequences of more than {len(text) - room} tokens, got seq_len {len(text)}; raise"
                " seq_len, or set retrieval to 0"
            )
        # Sorting is stable: what has the same place keeps its order, a question after its facts.
        pieces = sorted(((1 + int(place * (room - 1)), part, count) for place, part, count in drawn), key=itemgetter(0))
        tokens, kinds = [text[: pieces[0][0]]], [np.full(pieces[0][0], _TEXT)]
        for (place, part, count), (end, *_) in pairwise([*pieces, (room, [], 0)]):
            between = text[place:end]
            tokens += [np.array(part), between]
            kinds += [np.repeat((_PUZZLE, _ANSWER), (len(part) - count, count)), np.full(len(between), _TEXT)]
        kind = np.concatenate(kinds)
        return np.concatenate(tokens).astype(np.int64), kind == _ANSWER, kind == _TEXT

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _without_conflicts(rng: random.Random, count: int) -> list[Puzzle]:
    """Puzzles of the trained families, no two of which state different values of the same thing."""
    puzzles: list[Puzzle] = []
    stated = set[str]()
    while len(puzzles) < count:
        puzzle = questions.TASKS[rng.choice(FAMILIES)](rng)
        facts = {re.sub(r"\d+", "", sentence) for sentence in puzzle.hidden}
        if not facts & stated:
            stated |= facts
            puzzles.append(puzzle)
    return puzzles
