"""DuoAttention: a real-valued gate per unit, distilled on answers under an L1 penalty (arXiv 2410.10819).

Constants are those of `scripts/train.sh` and `duo_attn/train.py` in mit-han-lab/duo-attention, but for the number of
steps (2,000 there; about 63 is what it takes to close a gate at this learning rate). The text is another: there ten
passkeys of 32 words in a book, here what `consa.data.questions` hides.
"""

from __future__ import annotations

from itertools import chain, cycle

import numpy as np
import torch

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.problem import Problem
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import LoadedModel
from consa.training.loop import prepared

LEARNING_RATE = 0.02  # AdamW without weight decay
L1 = 0.05  # on the mean gate
RAMP, MIN_LR_RATIO = 0.2, 0.1  # the rate rises over the first fifth of the steps and falls over the last
SHORTEST = 1000  # tokens; from there to the longest in even steps
NUM_LENGTHS, PER_LENGTH = 8, 4  # there 50 lengths, with passkeys drawn anew for every epoch
INSIDE = 1e-6  # a gate at its bound is computed this far from it, so that it still has a gradient


def duo_attention(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Learn gates by how little closing them changes the last hidden states of answers; top gates keep full attention.

    Of `sequences` only the length counts: the text is made.
    """
    problem = Problem(loaded, sequences, config)
    model, units, longest = loaded.model, problem.units, sequences.shape[1]
    lengths = np.linspace(min(SHORTEST, longest), longest, NUM_LENGTHS).astype(int).tolist()
    pool = list(chain.from_iterable(problem.questions(PER_LENGTH, length) for length in lengths))
    order = np.random.default_rng(config.seed).permutation(len(pool))
    questions = cycle([pool[index] for index in order])
    gate = torch.nn.Parameter(torch.ones(units.count))
    optimizer = torch.optim.AdamW([gate], lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config.num_steps))
    with prepared(model), attached(model, problem.dense) as plan:
        model.requires_grad_(False)
        for _ in range(config.num_steps):
            for text in (next(questions) for _ in range(config.sequences_per_step)):
                tokens = problem.tensor(text)
                answer = slice(text.start - 1, None)  # from where its first token is predicted
                with torch.no_grad():
                    wanted = loss.hidden_states(model, tokens)[:, answer].float()
                rows = units.spread(gate.detach().clamp(INSIDE, 1 - INSIDE)[None], elsewhere=1)
                with plan.gated(rows, model.device) as leaf:
                    found = loss.hidden_states(model, tokens)[:, answer].float()
                    ((found - wanted).pow(2).mean() / config.sequences_per_step).backward()
                assert leaf.grad is not None  # no gate reaches a bound
                units.spread(gate[None], elsewhere=1).backward(leaf.grad.cpu())
                problem.forward_tokens += 2 * tokens.numel()
                problem.backward_tokens += tokens.numel()
            (L1 * gate.abs().mean()).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                gate.clamp_(0, 1)
    scores = problem.without_ties(gate.detach().double().numpy())
    return problem.decide("duo_attention", scores, learning_rate=LEARNING_RATE, l1=L1)


def lr_factor(step: int, num_steps: int) -> float:
    """Factor on the learning rate: a trapezium that never falls below `MIN_LR_RATIO`."""
    ramp = max(1, int(RAMP * num_steps))
    return min(1.0, *(max(part / ramp, MIN_LR_RATIO) for part in (step + 1, num_steps - step)))
