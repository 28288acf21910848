"""Train a small model with full attention on long documents until it finds needles: a subject to study on one GPU.

    python -m research.from_scratch prepare TEXT HELDOUT --out prepared
    python -m research.from_scratch train prepared --size 30m --out models/30m

TEXT and HELDOUT are JSON lines with `text`, plain or compressed by zstd. `prepare` makes a tokenizer of 16,384 entries
and three token files, `(num_sequences, seq_len)` uint16: `train.npy`, `heldout.npy` (one sequence of each document
first, then a second) and `needles.npy`, text in which numbers are hidden: from one that is mentioned all the time to 24
that are mentioned twice. `train` mixes one needle sequence into every four. It permutes the digits of a sequence anew
each time the sequence is used, so no number can be memorised. transformers and consa load the folder it writes;
`training.json` there has what was measured during training.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.common import environment, parser_of, write_json
from consa.data.questions import THINGS, examples
from consa.model.layout import decoder_layers

VOCABULARY = 16_384
END = "<|endoftext|>"
SEQ_LEN = 4096
SIZES: dict[str, dict[str, int]] = {  # both with 16 query heads and 8 KV heads of 64
    "30m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10},
    "60m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14},
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
NEEDLE_SHARE = 4  # one of so many sequences
TOKENS_PER_MENTION = 56  # of a sequence of needles: 72 in 4,096
LEARNING_RATE = {"30m": 1.5e-3, "60m": 1.0e-3}
FASTEST_FIRST = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
ATTENTION = [getattr(SDPBackend, name) for name in FASTEST_FIRST]
WARM_UP_STEPS, MIN_RATE, WEIGHT_DECAY, MAX_NORM = 100, 0.1, 0.1, 1.0


def main() -> None:
    """Run a phase."""
    parser = parser_of(__doc__)
    phases = parser.add_subparsers(dest="phase", required=True)
    preparing = phases.add_parser("prepare")
    preparing.add_argument("text", type=Path)
    preparing.add_argument("heldout", type=Path)
    preparing.add_argument("--needles", type=int, default=1200, help="sequences of them")
    preparing.add_argument("--seq-len", type=int, default=SEQ_LEN)
    preparing.add_argument("--vocabulary", type=int, default=VOCABULARY)
    training = phases.add_parser("train")
    training.add_argument("prepared", type=Path)
    training.add_argument("--size", choices=list(SIZES), required=True)
    training.add_argument("--tokens", type=float, default=200e6)
    training.add_argument("--sequences-per-step", type=int, default=16)
    training.add_argument("--micro-batch", type=int, default=16)
    training.add_argument("--evaluate-every", type=int, default=250, help="steps")
    training.add_argument("--seed", type=int, default=0)
    for phase in (preparing, training):
        phase.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    {"prepare": prepare, "train": train}[options.phase](options)


def prepare(options: argparse.Namespace) -> None:
    """Write a tokenizer and tokens."""
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts(options.text), options.vocabulary)
    tokenizer.save_pretrained(options.out)
    for name, path in (("train", options.text), ("heldout", options.heldout)):
        documents = list(sequences(texts(path), tokenizer, options.seq_len))
        rows = in_turns(documents) if name == "heldout" else np.concatenate(documents)
        np.save(options.out / f"{name}.npy", rows, allow_pickle=False)
        print(f"{name}: {len(rows)} sequences", flush=True)
    rng = random.Random(0)
    source = (text for _ in count() for text in texts(options.text))
    rows = np.stack([needles(source, tokenizer, options.seq_len, rng) for _ in range(options.needles)])
    np.save(options.out / "needles.npy", rows, allow_pickle=False)


def texts(path: Path) -> Iterator[str]:
    """The documents of a file of JSON lines."""
    import zstandard  # of which training has no need

    with path.open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
        for line in io.TextIOWrapper(raw, encoding="utf-8"):  # pyright: ignore[reportArgumentType]
            yield json.loads(line)["text"]


def make_tokenizer(documents: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every digit a token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text[:20_000] for text in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END, pad_token=END)


def sequences(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> Iterator[np.ndarray]:
    """Whole sequences of each document, `(n, seq_len)` uint16; its rest is left out."""
    for text in documents:
        ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.uint16)
        if len(ids) >= seq_len:
            yield ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)


def in_turns(documents: list[np.ndarray]) -> np.ndarray:
    """One sequence of each document, then a second of those that have one: any first few are of as many documents."""
    rounds = np.concatenate([np.arange(len(document)) for document in documents])
    return np.concatenate(documents)[np.argsort(rounds, kind="stable")]


def needles(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, rng: random.Random
) -> np.ndarray:
    """A piece of a document with numbers of things hidden in it and mentioned again later, `(seq_len,)` uint16.

    The fewer numbers, the more often each: the easy sequences teach to copy, the others to tell numbers apart. One in
    four begins with a question as `consa.data.questions` asks it, in between 512 tokens and all of the sequence.
    """
    words = next(text for text in documents if len(text) > 6 * seq_len)[: 6 * seq_len].split(" ")
    inserted: dict[int, list[str]] = {}
    mentions = rng.choice((3, 6, 12, 24, 72))  # of each number
    for index, thing in enumerate(rng.sample(THINGS, max(1, seq_len // TOKENS_PER_MENTION // mentions))):
        number = str(rng.randrange(10**6, 10**7))
        of = f" for {thing}" if index else ""
        first, *later = sorted(rng.choices(range(2 * len(words) // 5), k=mentions))
        inserted.setdefault(first, []).append(f"The special magic number{of} is {number}.")
        for place in later:
            asked = f"What is the special magic number{of} mentioned in the text? "
            question = asked if rng.random() < 0.5 else ""
            inserted.setdefault(place, []).append(f"{question}The special magic number{of} is {number}.")
    pieces = [piece for place, word in enumerate(words) for piece in (*inserted.get(place, []), word)]
    if rng.random() < 0.25:
        task, length = rng.choice(["single", "multi_key"]), rng.randrange(min(512, seq_len), seq_len + 1)
        (asked,) = examples(task, tokenizer, length=length, count=1, seed=rng.randrange(2**32))
        pieces = [asked.prompt, f"{asked.answers[0]}.\n\n", *pieces]
    ids = tokenizer(" ".join(pieces), verbose=False)["input_ids"]
    if len(ids) < seq_len:
        return needles(documents, tokenizer, seq_len, rng)
    return np.array(ids[:seq_len], dtype=np.uint16)


def train(options: argparse.Namespace) -> None:
    """Train from random weights, measuring on the way."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.prepared)
    text, heldout, hidden = (
        np.load(options.prepared / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("train", "heldout", "needles")
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = fresh(options.size, len(tokenizer), text.shape[1], options.seed)
    model.to(device)
    if device.type == "cuda":
        # Layer by layer: a model compiled whole builds a mask, which flash attention refuses.
        for layer in decoder_layers(model):
            layer.forward = torch.compile(layer.forward, dynamic=False)
    num_steps = max(1, int(options.tokens) // (options.sequences_per_step * text.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    stream = batches(text, hidden, tokenizer, options)
    asked = single_needles(tokenizer, text.shape[1], 20)
    record: dict[str, Any] = environment() | {"parameters": model.num_parameters(), "steps": num_steps, "measured": []}
    began = time.perf_counter()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[options.size] * rate(step, num_steps)
        total = torch.zeros((), device=device)
        for _ in range(options.sequences_per_step // options.micro_batch):
            tokens = next(stream).to(device)
            with (
                torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
                sdpa_kernel(ATTENTION, set_priority=True),
            ):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            share = options.micro_batch / options.sequences_per_step
            (loss * share).backward()
            total += loss.detach() * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.evaluate_every == 0 or step + 1 == num_steps:
            measured = {"step": step + 1, "seconds": round(time.perf_counter() - began, 1)}
            measured |= {"tokens": (step + 1) * options.sequences_per_step * text.shape[1]}
            measured |= {"loss": round(float(total), 4), **measure(model, heldout, asked)}
            record["measured"].append(measured)
            print(measured, flush=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    write_json(options.out / "training.json", record)


def fresh(size: str, vocabulary: int, seq_len: int, seed: int) -> PreTrainedModel:
    """A model of that size with random weights."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = SIZES[size] | HEADS
    return LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=vocabulary, max_position_embeddings=seq_len, tie_word_embeddings=True)
    )


def rate(step: int, num_steps: int) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine down to `MIN_RATE`."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, num_steps - WARM_UP_STEPS)
    return MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(
    text: np.ndarray, hidden: np.ndarray, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> Iterator[Tensor]:
    """Micro-batches `(micro_batch, seq_len)` int64, without end; text in a new order every epoch."""
    digits = np.array([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])
    rng = np.random.default_rng(options.seed)
    order: list[int] = []
    while True:
        rows = []
        for _ in range(options.micro_batch):
            if rng.integers(NEEDLE_SHARE) == 0:
                permuted = np.arange(len(tokenizer))
                permuted[digits] = rng.permutation(digits)
                rows.append(permuted[hidden[rng.integers(len(hidden))]])
            else:
                order = order or rng.permutation(len(text)).tolist()
                rows.append(text[order.pop()].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


def single_needles(tokenizer: PreTrainedTokenizerFast, length: int, number: int) -> list[tuple[Tensor, int]]:
    """Single needles of `length` tokens at most: prompts followed by their answers, and tokens of the answer."""
    asked = []
    for example in examples("single", tokenizer, length=length, count=number, seed=1):
        answer = tokenizer(" " + example.answers[0], add_special_tokens=False)["input_ids"]
        asked.append((torch.tensor(tokenizer(example.prompt)["input_ids"] + answer), len(answer)))
    return asked


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # each question has a length of its own
def measure(
    model: PreTrainedModel, heldout: np.ndarray, asked: list[tuple[Tensor, int]], rows: int = 32
) -> dict[str, float]:
    """Held-out loss, nats, and the share of needles that the greedy continuation names."""
    losses, right = [], 0
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        for row in heldout[:rows]:
            tokens = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
            losses.append(float(model(input_ids=tokens, labels=tokens, use_cache=False).loss))
        for tokens, answer in asked:
            tokens = tokens.to(model.device)
            logits = model(input_ids=tokens[None], logits_to_keep=answer + 1, use_cache=False).logits[0, :-1]
            right += bool((logits.argmax(-1) == tokens[-answer:]).all())
    return {"heldout_loss": round(float(np.mean(losses)), 4), "needles": round(right / len(asked), 3)}


if __name__ == "__main__":
    main()
