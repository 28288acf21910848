"""A behaviour run, which `consa behaviour` starts: load, measure what heads attend to, write the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from consa.behaviour.measure import measure, num_passes
from consa.behaviour.record import Behaviour
from consa.config import RunConfig
from consa.errors import ConsaError
from consa.progress import note, progress
from consa.runs import inputs


def run_behaviour(
    where: RunConfig,
    out: Path,
    *,
    seq_len: int,
    num_sequences: int,
    window: int,
    num_sink_tokens: int,
    seed: int,
    causal_sequences: int,
) -> Behaviour:
    """Measure behaviour on held-out text and write it to `out`; the arguments are those of `measure`.

    Raises:
        ConsaError: an error that the caller can fix.
    """
    if num_sequences < 1:
        raise ConsaError(f"num_sequences must be at least 1, got {num_sequences}")
    inputs.check(where)
    loaded = inputs.load(where, seq_len=seq_len)
    heldout = inputs.heldout_text(replace(where, num_heldout=num_sequences), seq_len, loaded)
    if len(heldout.tokens) < num_sequences:
        note(f"The text has {len(heldout.tokens)} held-out sequences of {seq_len} tokens; all of them are measured")
    total = num_passes(loaded.model, len(heldout.tokens), needles=True, causal=causal_sequences > 0)
    with progress("Observing", total) as update:
        behaviour = measure(
            loaded.model,
            heldout.tokens,
            window=window,
            num_sink_tokens=num_sink_tokens,
            seed=seed,
            tokenizer=loaded.tokenizer,
            causal_sequences=causal_sequences,
            identity=loaded.identity | {"data": where.data},
            on_pass=update,
        )
    behaviour.save(out)
    return behaviour
