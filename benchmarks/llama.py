"""llama.cpp on a CPU: a GGUF file, and the hybrid that `consa convert --kind gguf` made of it.

    consa convert DENSE.gguf --allocation LAYERS --num-sink-tokens 0 --kind gguf --out HYBRID.gguf
    pip install llama-cpp-python
    python benchmarks/llama.py DENSE.gguf HYBRID.gguf --text FILE --out benchmarks/results/llama-NAME.json

"loss" is the mean over the first tokens of the text, in nats; "apart" is the mean difference of a single token's loss
from consa's, which computes the same weights in float32. The dense file is apart by llama.cpp's arithmetic alone.
"window off by 1" is how far the hybrid is from consa's losses with one key more or less, whichever is nearer. KV MiB is
what llama.cpp's log says of full and sliding layers. Prefill and decoding are timed at the full context, dense and
hybrid in turn; medians.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from common import environment, parser_of, print_table, write_json

from consa import Allocation, attached
from consa.model.load import load_model
from consa.model.loss import token_losses

COLUMNS = ["file", "loss", "consa's loss", "apart", "window off by 1", "KV MiB, full", "KV MiB, sliding"]
COLUMNS += ["prefill, tokens/s", "decoding, tokens/s"]
BATCH = 512  # tokens that llama.cpp computes at once
CACHE = re.compile(r"size = +([\d.]+) MiB \( *\d+ cells")


class Engine:
    """A GGUF file in llama.cpp, with an empty KV cache for `context` tokens of one sequence.

    Attributes:
        caches: MiB of the KV caches in llama.cpp's log: that of full layers, then that of sliding ones.
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        log: list[str] = []
        keep = lib.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
        lib.llama_log_set(keep, ctypes.c_void_p(0))
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        self.context = lib.llama_init_from_model(self.model, params)
        lib.llama_log_set(QUIET, ctypes.c_void_p(0))
        if not self.context:
            raise SystemExit(f"llama.cpp cannot read {path}:\n{''.join(log[-5:])}")
        self.caches = [float(mib) for mib in CACHE.findall("".join(log))]
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def read(self, tokens: np.ndarray, *, start: int = 0, every: bool = False) -> np.ndarray:
        """Logits of the last token, or of every one: (tokens, vocabulary)."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens.tolist()):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == len(tokens) - 1
        assert lib.llama_decode(self.context, batch) == 0
        lib.llama_batch_free(batch)
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(lib.llama_get_logits(self.context), (rows, self.vocabulary)).copy()

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """The loss of every token but the first."""
        parts = []
        for start in range(0, len(tokens) - 1, BATCH):
            logits = torch.from_numpy(self.read(tokens[start : start + BATCH], start=start, every=True)).double()
            following = torch.from_numpy(tokens[start + 1 : start + 1 + BATCH]).long()
            parts.append(torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="none"))
        return torch.cat(parts).numpy()

    def speed(self, tokens: np.ndarray, steps: int) -> tuple[float, float]:
        """Tokens per second of reading `tokens`, and of greedy decoding after them."""
        begin = time.perf_counter()
        for start in range(0, len(tokens), BATCH):
            logits = self.read(tokens[start : start + BATCH], start=start)
        middle = time.perf_counter()
        for step in range(steps):
            logits = self.read(logits.argmax(1), start=len(tokens) + step)
        return len(tokens) / (middle - begin), steps / (time.perf_counter() - middle)

    def close(self) -> None:
        """Free the memory of model and context."""
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)


QUIET = lib.llama_log_callback(lambda level, text, data: None)


def allocation_of(path: Path) -> Allocation:
    """The allocation in the metadata of a file that `consa convert` wrote."""
    return Allocation.from_json(gguf.GGUFReader(path).fields["consa.allocation"].contents())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("hybrid", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="compared with consa (default: %(default)s)")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=32, help="decoding steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    files = {"dense": options.dense, "hybrid": options.hybrid}
    loaded, allocation = load_model(str(options.dense), dtype=torch.float32), allocation_of(options.hybrid)
    ids = np.array(loaded.tokenizer(options.text.read_text(encoding="utf-8")).input_ids, dtype=np.int32)
    assert len(ids) >= options.context, f"{options.text} has {len(ids)} tokens"
    compared, read = ids[: options.tokens], ids[: options.context - options.steps]
    tokens = torch.from_numpy(compared).long()[None]
    wanted: dict[int, np.ndarray] = {}  # by what is added to the window
    for more in (-1, 0, 1):
        with attached(loaded.model, replace(allocation, window=allocation.window + more)):
            wanted[more] = token_losses(loaded.model, tokens)[0].double().numpy()
    expected = {"dense": token_losses(loaded.model, tokens)[0].double().numpy(), "hybrid": wanted[0]}
    del loaded

    measured: dict[str, list[Any]] = {}
    for name, path in files.items():
        engine = Engine(path, options.context, options.threads)
        losses = engine.losses(compared)
        distances = [float(np.abs(losses - other).mean()) for other in (expected[name], wanted[-1], wanted[1])]
        off = min(distances[1:]) if name == "hybrid" else None
        measured[name] = [losses.mean(), expected[name].mean(), distances[0], off, *[*engine.caches, 0.0][:2]]
        engine.close()
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for _ in range(options.repeats):
        for name, path in files.items():
            engine = Engine(path, options.context, options.threads)
            speeds[name].append(engine.speed(read, options.steps))
            engine.close()
            print(name, *(round(speed, 2) for speed in speeds[name][-1]), flush=True)
    rows = []
    for name, path in files.items():
        medians = [statistics.median(times) for times in zip(*speeds[name], strict=True)]
        figures = [value if value is None else round(float(value), 4) for value in measured[name]]
        rows.append([path.name, *figures, *(round(speed, 1) for speed in medians)])
    if options.out:
        about = environment()
        about["versions"] |= {"llama-cpp-python": version("llama-cpp-python")}
        kept = {"sparsity": allocation.sparsity, "window": allocation.window, "speeds": speeds}
        write_json(options.out, about | kept | {"columns": COLUMNS, "rows": rows})
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
