"""Methods that train gates: ConSA, its nested form, PruLong and DuoAttention."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle, islice

import numpy as np
import torch

from consa.allocation import Allocation
from consa.config import BATCH_HELP, LearnConfig
from consa.methods import Method, TrainingMethod
from consa.methods.problem import Problem, cost
from consa.model import loss
from consa.model.attach import attached
from consa.settings import option
from consa.training import gates
from consa.training.learning import learn
from consa.training.loop import prepared
from consa.training.objective import Objective
from consa.training.refinement import Exchange

INSIDE = 1e-6  # a gate of DuoAttention at its bound is computed this far from it, so that it still has a gradient


@dataclass(frozen=True, kw_only=True)
class ConSA(TrainingMethod):
    """Learn an allocation by `consa.training.learning.learn`, at its defaults for all other settings.

    Gates under a sparsity constraint, then a refinement (arXiv 2606.18056).
    """

    name = "consa"
    refine_evaluations: int = option(
        LearnConfig.refine_evaluations, "Evaluations that the final refinement may use. 0 turns it off.", ge=0
    )
    evaluation_sequences: int = option(8, "Sequences of each evaluation of the refinement.", ge=1)
    retrieval: float = option(
        LearnConfig.retrieval, "Share of the loss that asks for facts hidden in the training text.", ge=0, le=1
    )

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        exchanges: list[Exchange] = []
        loaded, sequences = problem.loaded, problem.sequences
        refinement = {"refine_evaluations": self.refine_evaluations, "refine_sequences": self.evaluation_sequences}
        learning = self.learning(problem.config, retrieval=self.retrieval, **refinement)
        result = learn(
            loaded.model,
            sequences,
            learning,
            identity=loaded.identity,
            tokenizer=loaded.tokenizer,
            objective=self.objective(problem),
            on_exchange=exchanges.append,
        )
        trained = len(result.history) * self.sequences_per_step * sequences.shape[1]
        evaluations = exchanges[-1].evaluations if exchanges else 0  # that of the start included
        spent = cost(trained + evaluations * self.evaluation_sequences * sequences.shape[1], trained)
        provenance = {**result.allocation.provenance, "settings": asdict(self), "cost": spent}
        return replace(result.allocation, provenance=provenance)

    def objective(self, problem: Problem) -> Objective | None:
        """What a derived method learns on, instead of the next-token loss with a share of retrieval."""
        return None


@dataclass(frozen=True, kw_only=True)
class Nested(TrainingMethod):
    """Learn once, up to the largest sparsity; the scores rank the units for every smaller one too.

    The target rises slowly from 0 to the largest sparsity, and the units close one after another. Averaged over all
    steps, a unit's log_alpha says how long it stayed open. Cutting the order of these averages anywhere gives an
    allocation, and sparser ones keep a subset of what denser ones keep (see `consa.methods.choice.choose`).
    """

    name = "nested"
    ranks = True

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        most = 1 - 1 / problem.units.count  # where no unit is left to keep FA, there is nothing to learn
        sparsity = min(problem.config.sparsity, most)
        learning = self.learning(problem.config, sparsity=sparsity, refine_evaluations=0, warmup=1.0, averaged=1.0)
        result = learn(problem.loaded.model, problem.sequences, learning)
        assert result.allocation.scores is not None
        tokens = len(result.history) * self.sequences_per_step * problem.sequences.shape[1]
        problem.forward_tokens = problem.backward_tokens = tokens
        scores = problem.gather(result.allocation.scores)
        return problem.decide(self, scores, up_to=problem.config.sparsity, warmup=1.0, averaged=1.0)


@dataclass(frozen=True, kw_only=True)
class PruLong(TrainingMethod):
    """Learn gates on the next-token loss; the units of highest log_alpha keep full attention.

    Hard-concrete gates, with the sampled sparsity held by two multipliers (arXiv 2506.17121). Defaults are those of
    `prulong_masksonly.sh` and the training code in princeton-pli/PruLong; the schedule is scaled to the number of steps
    (1,000 there).
    """

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


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Method):
    """Learn gates by how little closing them changes the last hidden states of answers; top gates keep full attention.

    A real-valued gate per unit, distilled on answers under an L1 penalty (arXiv 2410.10819). The text is generated: of
    the problem's sequences only the length counts. Defaults are those of `scripts/train.sh` and `duo_attn/train.py` in
    mit-han-lab/duo-attention, but for the number of steps (2,000 there; about 63 is what it takes to close a gate at
    this learning rate) and the questions: there 50 lengths of ten passkeys of 32 words in a book, drawn anew for every
    epoch, here what `consa.data.questions` hides.
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
