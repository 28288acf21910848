"""Load what a `RunConfig` names: the dense model and the text."""

from __future__ import annotations

import torch

from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.data.documents import check_data
from consa.data.sequences import SequenceSet, Split, load_sequences
from consa.errors import ConsaError
from consa.model.attach import make_dense
from consa.model.layout import max_positions
from consa.model.load import LoadedModel, check_device, load_model, read_config
from consa.progress import note
from consa.training import distributed


def check(where: RunConfig) -> None:
    """Raise ConsaError for a device or text that does not exist or cannot be read, before anything is loaded."""
    check_device(where.device)
    for data in filter(None, (where.data, where.heldout_data)):
        check_data(data, where.text_field)


def load(where: RunConfig, **asked: int) -> LoadedModel:
    """Load the model; a converted hybrid becomes the dense model of its weights.

    Args:
        where: names it.
        asked: settings in tokens, by name, that the model must have positions for.

    Raises:
        ConsaError: it has too few, or as `load_model`.
    """
    dtype = getattr(torch, where.dtype) if where.dtype else None
    with distributed.main_first():
        longest = max_positions(read_config(where.model))
        for name, tokens in asked.items():
            if longest is not None and tokens > longest:
                raise ConsaError(f"{name} must be at most the {longest} positions of {where.model}, got {tokens}")
        if distributed.is_main():
            note(f"Loading {where.model}")
        loaded = load_model(where.model, device=where.device, dtype=dtype)
    make_dense(loaded.model)
    return loaded


def training_text(where: RunConfig, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    """Read the sequences to learn on; they share no document with `heldout_text`, unless that has data of its own."""
    return _read(where, where.data, "all" if where.heldout_data else "train", seq_len, loaded)


def heldout_text(where: RunConfig, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    """Read the sequences to measure on, from as many documents as possible."""
    source, split = (where.heldout_data, "all") if where.heldout_data else (where.data, "heldout")
    return _read(where, source, split, seq_len, loaded).spread(where.num_heldout)


def warn_if_repeated(num_sequences: int, config: LearnConfig | AdaptConfig) -> None:
    """Print a line if training uses each of its sequences more than once."""
    times = config.num_steps * config.sequences_per_step / num_sequences
    if times > 1 and distributed.is_main():
        note(f"Little text: each training sequence is used {times:.1f} times")


def _read(where: RunConfig, source: str, split: Split, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    if distributed.is_main():
        note(f"Reading {source}" if split == "all" else f"Reading {source} ({split})")
    with distributed.main_first():
        found = load_sequences(
            source, loaded.tokenizer, seq_len, split=split, max_tokens=where.max_tokens, text_field=where.text_field
        )
    if distributed.is_main():
        count, documents, unused = len(found.tokens), found.num_documents, found.num_skipped
        text = f"Found {count:,} sequences of {seq_len:,} tokens in {documents:,} document{'s' * (documents != 1)}"
        note(text + (f", {unused:,} of them too short or not text" if unused else ""))
    return found
