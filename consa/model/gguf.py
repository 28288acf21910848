"""A GGUF file's header: whether what it announces is there, before readers that believe any length are let loose."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SCALAR_BYTES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # by the number of their type
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4  # of a tensor in ggml
MAX_NESTING = 4  # of arrays; models have no array of arrays at all


def check_header(path: Path) -> None:
    """Walk through all fields and tensors of a header, each of which takes some bytes of the file, so that it ends.

    Raises:
        ValueError: the file is cut off, or a length or count is more than it holds.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).check()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4
        self.order = "<"
        if self.number("I") & 0xFFFF == 0:  # version 3 as a machine of the other byte order writes it
            self.order = ">"

    def check(self) -> None:
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        for _ in range(num_fields):
            name, kind = self.text(), self.number("I")
            start = self.place
            self.skip_value(kind)
            if name.endswith(b".block_count") and kind == 4:
                (num_blocks,) = struct.unpack_from(f"{self.order}I", self.data, start)
                if num_blocks > num_tensors:
                    raise ValueError(f"it announces {num_blocks} layers, but {num_tensors} tensors")
        for _ in range(num_tensors):
            self.text()
            dimensions = self.number("I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self.skip(8 * dimensions + 12)  # sizes, type, offset

    def skip(self, size: int) -> int:
        """Returns where it was before."""
        start = self.place
        if size > len(self.data) - start:
            raise ValueError(
                f"{size} bytes are announced at byte {start}, where {len(self.data) - start} are left"
            )
        self.place += size
        return start

    def number(self, kind: str) -> int:
        start = self.skip(struct.calcsize(f"={kind}"))
        return struct.unpack_from(f"{self.order}{kind}", self.data, start)[0]

    def text(self) -> bytes:
        start = self.skip(self.number("Q"))
        return self.data[start : self.place]

    def skip_value(self, kind: int, nesting: int = 0) -> None:
        if kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and nesting < MAX_NESTING:
            item, count = self.number("I"), self.number("Q")
            if item in SCALAR_BYTES:
                self.skip(SCALAR_BYTES[item] * count)
                return
            for _ in range(count):
                self.skip_value(item, nesting + 1)
        else:
            raise ValueError(f"a value of type {kind} is announced at byte {self.place}")
