"""ConSA itself: gates under a sparsity constraint, then a refinement (arXiv 2606.18056)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from consa.allocation import Allocation
from consa.config import LearnConfig
from consa.methods import TrainingMethod
from consa.methods.problem import Problem, cost
from consa.settings import option
from consa.training.learning import learn
from consa.training.refinement import Exchange


@dataclass(frozen=True, kw_only=True)
class ConSA(TrainingMethod):
    """Learn an allocation by `consa.training.learning.learn`, at its defaults for all other settings."""

    name = "consa"

    refine_evaluations: int = option(
        LearnConfig.refine_evaluations, "Evaluations that the final refinement may use. 0 turns it off.", ge=0
    )
    evaluation_sequences: int = option(8, "Sequences of each evaluation of the refinement.", ge=1)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        exchanges: list[Exchange] = []
        learning = self.learning(
            problem.config, refine_evaluations=self.refine_evaluations, refine_sequences=self.evaluation_sequences
        )
        loaded, sequences = problem.loaded, problem.sequences
        result = learn(loaded.model, sequences, learning, identity=loaded.identity, on_exchange=exchanges.append)
        trained = len(result.history) * self.sequences_per_step
        evaluations = exchanges[-1].evaluations if exchanges else 0  # that of the start included
        evaluated = evaluations * self.evaluation_sequences
        length = sequences.shape[1]
        spent = cost((trained + evaluated) * length, trained * length)
        provenance = {**result.allocation.provenance, "settings": asdict(self), "cost": spent}
        return replace(result.allocation, provenance=provenance)
