"""Check a GGUF file's header before transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def check_header(path: Path) -> None:
    """Read the header and map every tensor.

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
