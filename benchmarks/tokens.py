"""Text as a file of tokens, one sequence of each document: what the benchmarks on a GPU take with them.

    python benchmarks/tokens.py TEXT --seq-len 8192 --out train.npy

TEXT is anything `consa learn --data` takes. Documents shorter than a sequence are left out. The sequences' domains go
to train.domains.txt beside it, a line each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import parser_of

from consa.data.sequences import load_sequences
from consa.model.load import load_model


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = load_sequences(options.text, load_model(options.model).tokenizer, options.seq_len)
    chosen = found.spread(len(np.unique(found.documents)))
    np.save(options.out, chosen.tokens)
    options.out.with_suffix(".domains.txt").write_text("".join(f"{name}\n" for name in chosen.domains))
    print(f"{len(chosen.tokens)} sequences of {options.seq_len} tokens in {options.out}")


if __name__ == "__main__":
    main()
