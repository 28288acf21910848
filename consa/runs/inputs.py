"""What a `RunConfig` names: the dense model and the text that runs, evaluations and measurements begin with."""

from __future__ import annotations

import torch

from consa.training import distributed
from consa.config import RunConfig
from consa.data.sequences import SequenceSet, Split, load_sequences
from consa.data.documents import check_data
from consa.model.load import LoadedModel, check_device, load_model
from consa.model.attach import make_dense
from consa.progress import note


def check(where: RunConfig) -> None:
    """Raise a ConsaError for a device or text that is not there, before anything is loaded."""
    check_device(where.device)
    for data in filter(None, (where.data, where.heldout_data)):
        check_data(data)


def load(where: RunConfig) -> LoadedModel:
    """The model; of a converted hybrid the dense model of its weights.

    Raises:
        ConsaError: as `load_model`.
    """
    if distributed.is_main():
        note(f"Loading {where.model}")
    dtype = getattr(torch, where.dtype) if where.dtype else None
    with distributed.main_first():
        loaded = load_model(where.model, device=where.device, dtype=dtype)
    make_dense(loaded.model)
    return loaded


def training_text(where: RunConfig, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    """Sequences to learn on; no document of them is in `heldout_text`, unless other data is given for that.

    Raises:
        ConsaError: the text cannot be read, or holds no such sequence.
    """
    return _read(where, where.data, "all" if where.heldout_data else "train", seq_len, loaded)


def heldout_text(where: RunConfig, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    """Sequences to measure on, from as many documents as there are.

    Raises:
        ConsaError: the text cannot be read, or holds no such sequence.
    """
    source, split = (where.heldout_data, "all") if where.heldout_data else (where.data, "heldout")
    return _read(where, source, split, seq_len, loaded).spread(where.num_heldout)


def _read(where: RunConfig, source: str, split: Split, seq_len: int, loaded: LoadedModel) -> SequenceSet:
    if distributed.is_main():
        note(f"Reading {source}" if split == "all" else f"Reading {source} ({split})")
    with distributed.main_first():
        found = load_sequences(
            source,
            loaded.tokenizer,
            seq_len,
            split=split,
            max_tokens=where.max_tokens,
            text_field=where.text_field,
        )
    if distributed.is_main():
        count, documents, unused = len(found.tokens), found.num_documents, found.num_skipped
        said = f"Found {count:,} sequences of {seq_len:,} tokens in {documents:,} documents"
        note(said + (f", {unused:,} of them too short or not text" if unused else ""))
    return found
