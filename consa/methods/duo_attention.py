"""DuoAttention: a real-valued gate per unit, distilled on answers under an L1 penalty (arXiv 2410.10819).

Defaults are those of `scripts/train.sh` and `duo_attn/train.py` in mit-han-lab/duo-attention, but for the number of
steps (2,000 there; about 63 is what it takes to close a gate at this learning rate) and the questions: there 50 lengths
of ten passkeys of 32 words in a book, drawn anew for every epoch, here what `consa.data.questions` hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np
import torch

from consa.allocation import Allocation
from consa.config import BATCH_HELP, LearnConfig
from consa.methods import Method
from consa.methods.problem import Problem
from consa.model import loss
from consa.model.attach import attached
from consa.settings import option
from consa.training.loop import prepared

INSIDE = 1e-6  # a gate at its bound is computed this far from it, so that it still has a gradient


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Method):
    """Learn gates by how little closing them changes the last hidden states of answers; top gates keep full attention.

    The text is generated: of the problem's sequences only the length counts.
    """

    name = "duo_attention"
    ranks = True

    num_steps: int = option(LearnConfig.num_steps, "Optimizer steps.", ge=1)
    sequences_per_step: int = option(LearnConfig.sequences_per_step, BATCH_HELP, ge=1)
    learning_rate: float = option(0.02, "Peak learning rate of AdamW, without weight decay.", gt=0)
    l1: float = option(0.05, "Coefficient of the mean gate in the loss.", ge=0)
    ramp: float = option(
        0.2, "Share of the steps over which the learning rate rises, and over which it falls.", ge=0, le=0.5
    )
    min_lr_ratio: float = option(0.1, "Lowest learning rate, as a share of the peak learning rate.", ge=0, le=1)
    shortest: int = option(1000, "Length of the shortest questions, in tokens.", ge=1)
    num_lengths: int = option(8, "Lengths of questions, evenly spaced up to that of the sequences.", ge=1)
    per_length: int = option(4, "Questions of each length.", ge=1)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        model, units, longest = problem.loaded.model, problem.units, problem.sequences.shape[1]
        lengths = np.linspace(min(self.shortest, longest), longest, self.num_lengths).astype(int).tolist()
        pool = list(chain.from_iterable(problem.questions(self.per_length, length) for length in lengths))
        order = np.random.default_rng(problem.config.seed).permutation(len(pool))
        questions = cycle([pool[index] for index in order])
        gate = torch.nn.Parameter(torch.ones(units.count))
        optimizer = torch.optim.AdamW([gate], lr=self.learning_rate, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        with prepared(model), attached(model, problem.dense) as plan:
            model.requires_grad_(False)
            for _ in range(self.num_steps):
                for text in (next(questions) for _ in range(self.sequences_per_step)):
                    tokens = problem.tensor(text)
                    answer = slice(text.start - 1, None)  # from where its first token is predicted
                    with torch.no_grad():
                        wanted = loss.hidden_states(model, tokens)[:, answer].float()
                    rows = units.spread(gate.detach().clamp(INSIDE, 1 - INSIDE)[None], elsewhere=1)
                    with plan.gated(rows, model.device) as leaf:
                        hidden = loss.hidden_states(model, tokens)[:, answer].float()
                        ((hidden - wanted).pow(2).mean() / self.sequences_per_step).backward()
                    assert leaf.grad is not None  # no gate reaches a bound
                    units.spread(gate[None], elsewhere=1).backward(leaf.grad.cpu())
                    problem.forward_tokens += 2 * tokens.numel()
                    problem.backward_tokens += tokens.numel()
                (self.l1 * gate.abs().mean()).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    gate.clamp_(0, 1)
        scores = problem.without_ties(gate.detach().double().numpy())
        return problem.decide(self, scores)

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate: a trapezium that never falls below `min_lr_ratio`."""
        ramp = max(1, int(self.ramp * self.num_steps))
        parts = (step + 1, self.num_steps - step)
        return min(1.0, *(max(part / ramp, self.min_lr_ratio) for part in parts))
