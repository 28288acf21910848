"""What a summary counts."""

from __future__ import annotations

import numpy as np

from consa import rules
from consa.config import LearnConfig
from consa.data.sequences import SequenceSet
from consa.evaluation.table import Table
from consa.runs import summary as summaries


def test_documents_are_counted_once():
    heldout = SequenceSet(
        tokens=np.zeros((3, 96), int), domains=("",) * 3, documents=np.array([4, 4, 7]), num_documents=9, num_skipped=7
    )
    allocation = rules.top(4, 3, sparsity=0.5)
    table = Table(start=32, cache_tokens=1, lines=(), how={})
    said = summaries.summarise({}, allocation, LearnConfig(), heldout, table, {}, {})
    assert (said["heldout_sequences"], said["heldout_documents"]) == (3, 2)
