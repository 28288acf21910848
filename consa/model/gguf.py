"""Check a GGUF file's header before transformers reads it, and what it made of it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from consa.errors import UnsupportedModelError

FREQUENCIES = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")  # tensors that change the angles of RoPE

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_header(path: Path) -> Any:
    """Read the header and map every tensor; returns the reader.

    `GGUFReader` refuses most damaged files by itself, but reads arrays of any announced length, beyond the end of the
    file too, and transformers builds as many layers as the header announces.

    Raises:
        ImportError: gguf is not installed.
        Exception: whatever `GGUFReader` raises for a file that is damaged or cut off.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"{count} values are announced at byte {offset}, beyond the end of the file")
            return super()._get(offset, dtype, count, *args, **kwargs)

    reader = Reader(path)
    if not reader.tensors:
        raise ValueError("it holds no tensors")
    for name, field in reader.fields.items():
        if name.endswith(".block_count") and field.parts[-1][0] > len(reader.tensors):
            raise ValueError(f"{field.parts[-1][0]} layers are announced, with {len(reader.tensors)} tensors")
    return reader


def apply_header(reader: Any, fields: dict[str, Any], weights: set[str]) -> None:
    """Put into a model's config `fields` what its header says of RoPE, which transformers leaves out.

    Args:
        reader: what `check_header` returned.
        fields: of the config that transformers made of the file.
        weights: names in the model that transformers made.

    Raises:
        UnsupportedModelError: the model would lack a kind of RoPE scaling, frequencies, biases or a window.
    """
    fix = "use the model's safetensors instead"
    header = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear")) or 1.0
    scaling = header.get("rope.scaling.type", "none" if factor == 1 else "linear")
    if scaling == "linear":
        fields["rope_parameters"] = (fields.get("rope_parameters") or {}) | {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise UnsupportedModelError(f"rope.scaling.type {scaling!r} of a GGUF file is not supported; {fix}")
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight" and scaling == "none" and (rope := _llama3(tensor.data, fields)):
            fields["rope_parameters"] = rope
        elif tensor.name.startswith(FREQUENCIES):
            raise UnsupportedModelError(f"its RoPE frequencies ({tensor.name}) are not supported; {fix}")
    biases = [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]
    if len(biases) > sum(name.endswith("bias") for name in weights):
        raise UnsupportedModelError(
            f"the model would lack some of its {len(biases)} biases, such as {biases[0]}; {fix}"
        )
    window = header.get("attention.sliding_window")
    if window and window != fields.get("sliding_window"):
        raise UnsupportedModelError(
            f"its attention.sliding_window {window} would become {fields.get('sliding_window')} in the model; {fix}"
        )


def _llama3(factors: Any, fields: dict[str, Any]) -> dict[str, Any] | None:
    """The RoPE scaling of Llama 3 (Grattafiori et al. 2024) that divides the frequencies by `factors`, or None.

    The factor is 1 for wavelengths below 8192 / 4 tokens and the largest for those above 8192; in between, the share of
    the unscaled frequency grows linearly with the frequency.
    """
    rope = fields.get("rope_parameters") or {}
    scaling = LLAMA3 | {"factor": float(np.max(factors))}
    low, high, positions = (scaling[name] for name in list(LLAMA3)[1:])
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    share = np.clip((positions / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / (share + (1 - share) / scaling["factor"])
    return rope | scaling if np.allclose(factors, expected, rtol=1e-4) else None
