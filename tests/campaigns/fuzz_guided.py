"""Inputs that follow the branches they reach, for the readers written in Python alone; needs `pip install atheris`.

`python -m tests.campaigns.fuzz_guided FOLDER -runs=60000 -seed=1` keeps what reached something new in FOLDER.
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
    from consa.model.gguf import check_header

FILE = Path(tempfile.mkdtemp()) / "input"


def read(data: bytes) -> None:
    """The same bytes as an allocation, as what follows GGUF's magic, and as a TSV; anything but a refusal ends it."""
    with contextlib.suppress(ConsaError):
        Allocation.from_json(data.decode(errors="replace"))
    FILE.write_bytes(b"GGUF" + data)
    with contextlib.suppress(ValueError):
        check_header(FILE)
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
