"""Tokenize text into a file of tokens, one sequence per document: the input of the studies.

    python -m research.tokens TEXT --seq-len 8192 --out train.npy

TEXT is anything `consa learn --data` takes. Documents shorter than a sequence are dropped. The domain of each sequence
is a line of train.domains.txt, beside the tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common import parser_of
from consa.data.sequences import load_sequences
from consa.model.load import load_model


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    every = load_sequences(options.text, load_model(options.model).tokenizer, options.seq_len)
    chosen = every.spread(len(np.unique(every.documents)))
    np.save(options.out, chosen.tokens, allow_pickle=False)
    options.out.with_suffix(".domains.txt").write_text("".join(f"{name}\n" for name in chosen.domains))
    print(f"{len(chosen.tokens)} sequences of {options.seq_len} tokens in {options.out}")


if __name__ == "__main__":
    main()
