"""PruLong: hard-concrete gates, with the sampled sparsity held by two multipliers (arXiv 2506.17121).

Defaults are those of `prulong_masksonly.sh` and the training code in princeton-pli/PruLong; the schedule is scaled to
the number of steps (1,000 there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch

from consa.allocation import Allocation
from consa.methods import TrainingMethod
from consa.methods.problem import Problem
from consa.model import loss
from consa.model.attach import attached
from consa.settings import option
from consa.training import gates
from consa.training.loop import prepared


@dataclass(frozen=True, kw_only=True)
class PruLong(TrainingMethod):
    """Learn gates on the next-token loss; the units of highest log_alpha keep full attention."""

    name = "prulong"

    initial_log_alpha: float = option(4.0, "Initial log_alpha of the gates, as in reset_masks.")
    initial_noise: float = option(0.01, "Standard deviation of the initial log_alpha.", ge=0)
    learning_rate: float = option(
        1.0, "Peak learning rate of AdamW, for masks (descent) and multipliers (ascent).", gt=0
    )
    beta1: float = option(0.9, "Decay rate of AdamW's first moment.", ge=0, le=1)
    beta2: float = option(0.95, "Decay rate of AdamW's second moment.", ge=0, le=1)
    weight_decay: float = option(0.1, "Weight decay of AdamW, on masks and multipliers.", ge=0)
    max_grad_norm: float = option(
        1.0, "Norm to which larger gradients of masks and multipliers together are clipped.", gt=0
    )
    lr_warmup: float = option(
        0.1, "Share of the steps over which the learning rate rises from 0. It then falls as a cosine.", ge=0, le=1
    )
    min_lr_ratio: float = option(
        0.01, "Lowest learning rate after the warm-up, as a share of the peak learning rate.", ge=0, le=1
    )
    sparsity_warmup: float = option(
        0.8, "Share of the steps over which the target sparsity rises, linearly.", gt=0, le=1
    )

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        model, units, text = problem.loaded.model, problem.units, problem.stream()
        generator = torch.Generator().manual_seed(problem.config.seed)
        start = self.initial_log_alpha + self.initial_noise * torch.randn(units.count, generator=generator)
        log_alpha, multipliers = torch.nn.Parameter(start), torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.AdamW(
            [{"params": [log_alpha]}, {"params": [multipliers], "maximize": True}],
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        with prepared(model, compile=self.compile), attached(model, problem.dense) as plan:
            model.requires_grad_(False)
            for step in range(self.num_steps):
                target = problem.target_sparsity * min(1, step / math.ceil(self.sparsity_warmup * self.num_steps))
                for batch in problem.batches(list(islice(text, self.sequences_per_step))):
                    tokens = problem.tensor(*batch)
                    draws = [torch.rand(units.count, generator=generator) for _ in batch]
                    z = gates.sample(log_alpha, torch.stack(draws))
                    rows = units.spread(z, elsewhere=1)  # (layers, sequences, kv_heads)
                    with plan.gated(rows, model.device) as leaf:
                        loss.backward(model, tokens, scale=len(batch) / self.sequences_per_step)
                    violation = 1 - z.mean(1) - target
                    penalty = (multipliers[0] * violation + multipliers[1] * violation**2).sum()
                    gradient = torch.zeros_like(rows) if leaf.grad is None else leaf.grad.cpu()
                    torch.autograd.backward([penalty / self.sequences_per_step, rows], [None, gradient])
                    problem.forward_tokens += tokens.numel()
                    problem.backward_tokens += tokens.numel()
                torch.nn.utils.clip_grad_norm_([log_alpha, multipliers], self.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return problem.decide(self, log_alpha.detach().double().numpy())

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate: a linear warm-up, then a cosine down to `min_lr_ratio`."""
        warmup = math.ceil(self.lr_warmup * self.num_steps)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
