"""PruLong: hard-concrete gates, with the sampled sparsity held by two multipliers (arXiv 2506.17121).

Constants are those of `prulong_masksonly.sh` and the training code in princeton-pli/PruLong; the schedule is scaled to
the number of steps (1,000 there).
"""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import torch

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.problem import Problem
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import LoadedModel
from consa.training import gates
from consa.training.loop import prepared

INITIAL_LOG_ALPHA, INITIAL_NOISE = 4.0, 0.01  # reset_masks
LEARNING_RATE = 1.0  # of masks (descent) and multipliers (ascent) alike
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # on masks and multipliers too
MAX_GRADIENT_NORM = 1.0  # of masks and multipliers together
LR_WARMUP, MIN_LR_RATIO = 0.1, 0.01  # linear from 0, then a cosine
SPARSITY_WARMUP = 0.8  # share of the steps over which the target rises, linearly


def prulong(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Learn gates on the next-token loss of `sequences`; the units of highest log_alpha keep full attention."""
    problem = Problem(loaded, sequences, config)
    model, units, text = loaded.model, problem.units, problem.stream()
    generator = torch.Generator().manual_seed(config.seed)
    start = INITIAL_LOG_ALPHA + INITIAL_NOISE * torch.randn(units.count, generator=generator)
    log_alpha, multipliers = torch.nn.Parameter(start), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW(
        [{"params": [log_alpha]}, {"params": [multipliers], "maximize": True}],
        lr=LEARNING_RATE,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config.num_steps))
    with prepared(model, compile=config.compile), attached(model, problem.dense) as plan:
        model.requires_grad_(False)
        for step in range(config.num_steps):
            target = problem.target_sparsity * min(1, step / math.ceil(SPARSITY_WARMUP * config.num_steps))
            for batch in problem.batches(list(islice(text, config.sequences_per_step))):
                tokens = problem.tensor(*batch)
                draws = [torch.rand(units.count, generator=generator) for _ in batch]
                z = gates.sample(log_alpha, torch.stack(draws))
                rows = units.spread(z, elsewhere=1)  # (layers, sequences, kv_heads)
                with plan.gated(rows, model.device) as leaf:
                    loss.backward(model, tokens, scale=len(batch) / config.sequences_per_step)
                violation = 1 - z.mean(1) - target
                penalty = (multipliers[0] * violation + multipliers[1] * violation**2).sum()
                gradient = torch.zeros_like(rows) if leaf.grad is None else leaf.grad.cpu()
                torch.autograd.backward([penalty / config.sequences_per_step, rows], [None, gradient])
                problem.forward_tokens += tokens.numel()
                problem.backward_tokens += tokens.numel()
            torch.nn.utils.clip_grad_norm_([log_alpha, multipliers], MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return problem.decide("prulong", log_alpha.detach().double().numpy(), learning_rate=LEARNING_RATE)


def lr_factor(step: int, num_steps: int) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine down to `MIN_LR_RATIO`."""
    warmup = math.ceil(LR_WARMUP * num_steps)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress))
