"""Coverage-guided fuzzing of the readers written in Python; needs `pip install atheris`.

`python -m tests.campaigns.fuzz_guided FOLDER -runs=60000 -seed=1` keeps inputs that reach new code in FOLDER.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]
import numpy as np

with atheris.instrument_imports(include=["consa", "json"]):
    from consa import Allocation, ConsaError
    from consa.data.tsv import read_tsv

FILE = Path(tempfile.mkdtemp()) / "input"


def read(data: bytes) -> None:
    """Read the same bytes as an allocation and as a TSV; any error but a refusal ends the run."""
    with contextlib.suppress(ConsaError):
        Allocation.from_json(data.decode(errors="replace"))
    FILE.write_bytes(data)
    with contextlib.suppress(ConsaError):
        read_tsv(FILE, num_layers=2, num_kv_heads=2)


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    corpus.mkdir(exist_ok=True)
    (corpus / "allocation").write_text(Allocation(full_attention=np.eye(2, dtype=bool), window=3).to_json())
    (corpus / "tsv").write_text("0.5\t1\n1\t0\n")
    atheris.Setup([sys.argv[0], "-max_len=2000", *sys.argv[2:], str(corpus)], read)
    atheris.Fuzz()
