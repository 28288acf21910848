"""What the paged kernels are tested on, wherever they run; by itself, the small cases under Triton's interpreter."""

from __future__ import annotations

import os
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consa.attention.portable import full_attention
from consa.attention.reference import reference_attention
from tests.compare import assert_close


class Batch(NamedTuple):
    """New tokens and context of each request; requests of 0 new tokens are the padding of a CUDA graph."""

    new: tuple[int, ...]
    context: tuple[int, ...]


BATCHES = {
    "decoding": Batch((1, 1, 1, 0, 1), (0, 15, 16, 0, 147)),
    "one-token prompts": Batch((1,), (0,)),
    "prompts": Batch((37, 5, 64), (0, 0, 0)),
    "chunks": Batch((33, 16), (48, 101)),
    "mixed": Batch((1, 40, 0, 1, 7, 1), (90, 33, 0, 0, 64, 17)),
}


class Shape(NamedTuple):
    """KV heads of a layer: `groups[h]` is the cache group of head h, in which group 0 is full attention."""

    groups: tuple[int, ...] = (1, 0, 2, 0, 1, 3)
    group: int = 2
    head_dim: int = 32
    page: int = 16


class Problem:
    """Pages with a context in them, and new tokens to write and attend with.

    Everything that a kernel may not read is NaN: pages of other requests, those that a window has left behind and that
    stale entries of the page tables name, and the rest of a last page.
    """

    def __init__(
        self, batch: Batch, shape: Shape, window: int, num_sink_tokens: int, device: Any, dtype: torch.dtype
    ) -> None:
        self.batch, self.shape, self.window, self.num_sink_tokens = batch, shape, window, num_sink_tokens
        generator = torch.Generator().manual_seed(sum(batch.context) + window)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        num_heads, head_dim, page = len(shape.groups), shape.head_dim, shape.page
        lengths = [new + context for new, context in zip(batch.new, batch.context, strict=True)]
        num_groups = max(shape.groups) + 1
        most = max(-(-length // page) for length in lengths) + 1
        num_pages = 2 + num_groups * len(lengths) * most
        order = (torch.randperm(num_pages - 2, generator=generator) + 1).reshape(num_groups, len(lengths), most)
        self.tables = [table.to(device, torch.int32) for table in order]
        places = max(shape.groups.count(kind) for kind in set(shape.groups))
        self.buffer = torch.full((places, num_pages, page, 2 * head_dim), float("nan"), device=device, dtype=dtype)
        seen: dict[int, int] = {}
        self.caches = []  # of each head, as an engine gives them
        for kind in shape.groups:
            self.caches.append(self.buffer[seen.get(kind, 0)][:, None])
            seen[kind] = seen.get(kind, 0) + 1
        padding = 3  # rows that belong to no request
        tokens = sum(batch.new) + padding
        self.query = normal(tokens, num_heads * shape.group + 1, head_dim)[:, 1:]
        self.new_keys, self.new_values = normal(tokens, 2 * num_heads, head_dim).chunk(2, dim=1)
        slots = torch.full((num_groups, tokens), -1, dtype=torch.int64)
        self.keys, self.values, row = [], [], 0  # of each request, all of its tokens
        for request, (new, context) in enumerate(zip(*batch, strict=True)):
            k, v = normal(num_heads, context, head_dim), normal(num_heads, context, head_dim)
            for head, kind in enumerate(shape.groups):
                table = self.tables[kind][request]
                for position in range(context):
                    if self._kept(kind, position, context):
                        slot = self.caches[head][table[position // page], 0, position % page]
                        slot.copy_(torch.cat([k[head, position], v[head, position]]))
            rows = slice(row, row + new)
            self.keys.append(torch.cat([k, self.new_keys[rows].transpose(0, 1)], dim=1))
            self.values.append(torch.cat([v, self.new_values[rows].transpose(0, 1)], dim=1))
            position = torch.arange(context, context + new)
            for kind in range(num_groups):
                table = self.tables[kind][request].cpu()
                slots[kind, rows] = table[position // page].long() * page + position % page
                for stale in range(most):  # pages that no token of the request is in any more
                    inside = range(stale * page, (stale + 1) * page)
                    if not any(p >= context or self._kept(kind, p, context) for p in inside):
                        self.tables[kind][request, stale] = num_pages - 1
            row += new
        self.slots = list(slots.to(device))
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *batch.new]).cumsum(0)
        self.query_starts = starts.to(device, torch.int32)

    def _kept(self, kind: int, position: int, context: int) -> bool:
        near = position > context - self.window  # the first new token sees it
        return kind == 0 or near or position < self.num_sink_tokens

    def run(self) -> Tensor:
        """Write and attend by the kernels; NaN where they leave the output alone."""
        from consa.serving import kernels

        full = [head for head, kind in enumerate(self.shape.groups) if kind == 0]
        sliding = [head for head, kind in enumerate(self.shape.groups) if kind != 0]
        order = full + sliding
        kinds = [self.shape.groups[head] for head in order]
        caches = [self.caches[head] for head in order]
        tables, slots = [self.tables[kind] for kind in kinds], [self.slots[kind] for kind in kinds]
        heads = kernels.address_table(order, caches, tables, slots)
        kernels.write(self.new_keys, self.new_values, caches[0], heads, slots[0], num_tokens=len(self.query))
        output = torch.full_like(self.query, float("nan"))
        kinds = [(kernels.FULL_WINDOW, 0, heads[: len(full)])] if full else []
        kinds += [(self.window, self.num_sink_tokens, heads[len(full) :])] if sliding else []
        for window, sinks, rows in kinds:
            kernels.attention(
                self.query,
                output,
                caches[0],
                rows,
                tables[0],
                group=self.shape.group,
                seq_lens=self.seq_lens,
                query_starts=self.query_starts,
                num_tokens=len(self.query),
                decoding=max(self.batch.new) == 1,
                window=window,
                num_sink_tokens=sinks,
                scaling=0.25,
            )
        return output

    def wanted(self) -> Tensor:
        """The same by dense masks, `(tokens of requests, query heads, head_dim)`."""
        full = torch.tensor([[kind == 0 for kind in self.shape.groups]], device=self.query.device).float()
        outputs = []
        rows = self.query[: sum(self.batch.new)].split(self.batch.new)
        for query, k, v in zip(rows, self.keys, self.values, strict=True):
            if len(query):
                options: Any = {"window": self.window, "num_sink_tokens": self.num_sink_tokens}
                out = reference_attention(query.transpose(0, 1)[None], k[None], v[None], full, scaling=0.25, **options)
                outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


def check(
    batch: Batch,
    shape: Shape,
    window: int,
    num_sink_tokens: int,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
) -> None:
    """The kernels' output is that of dense masks, and padding's output is left alone."""
    problem = Problem(batch, shape, window, num_sink_tokens, device, dtype)
    output = problem.run()
    tokens = sum(batch.new)
    assert_close(output[:tokens], problem.wanted(), tolerance)
    assert output[tokens:].isnan().all()


def check_no_keys(batch: Batch, shape: Shape) -> None:
    """Requests of length 0 that have queries, as an engine's warm-up may have them, get 0."""
    problem = Problem(batch, shape, 17, 4, "cpu", torch.float32)
    problem.seq_lens.zero_()
    assert (problem.run()[: sum(batch.new)] == 0).all()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *, cu_seqlens_q: Tensor, seqused_k: Tensor,
    block_table: Tensor, softmax_scale: float, **ignored: Any,
) -> Tensor:  # fmt: skip
    """What vLLM's FlashAttention computes of paged keys and values `(pages, page tokens, kv_heads, head_dim)`."""
    out = torch.empty_like(q) if out is None else out
    starts, page = cu_seqlens_q.tolist(), k.shape[1]
    for request, length in enumerate(seqused_k.tolist()):
        rows = slice(*starts[request : request + 2])
        if rows.start == rows.stop:
            continue
        position = torch.arange(length)
        pages = block_table[request, position // page].long()
        keys, values = (x[pages, position % page].transpose(0, 1)[None] for x in (k, v))
        found = full_attention(q[rows].transpose(0, 1)[None], keys, values, scaling=softmax_scale)
        out[rows] = found[0].transpose(0, 1)
    return out


def patch_interpreter() -> None:
    """Make Triton's interpreter work with numpy 2.4, where int() of an array of one element is an error."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def interpret() -> None:
    """All small cases."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    patch_interpreter()
    from consa.serving import kernels

    # So small that windows take several blocks. Keys of a decoding request are spread over as many programs as there
    # are blocks (for full attention many more), or over two.
    spread, two, whole = (kernels.Blocks(16, 16, 4, 1, programs) for programs in (1000, 50, 0))
    every = list(product((1, 15, 16, 17, 64), (0, 1, 4, 16, 20)))
    sliding = Shape(groups=(2, 1))
    for blocks, shape, cases in ((spread, sliding, every), (two, Shape(), every[::4]), (whole, Shape(), every[1::4])):
        kernels.FLOAT32 = blocks
        for window, sinks in cases:
            check(BATCHES["decoding"], shape, window, sinks)
        print("decoding", blocks, flush=True)
    for name in ("one-token prompts", "prompts", "chunks", "mixed"):
        for window, sinks in every[::4]:
            check(BATCHES[name], Shape(), window, sinks)
        print(name, flush=True)
    for blocks, name in ((spread, "decoding"), (whole, "decoding"), (whole, "chunks")):
        kernels.FLOAT32 = blocks
        check_no_keys(BATCHES[name], Shape())
    kernels.FLOAT32 = spread
    for shape in (
        Shape(groups=(1, 1)),  # no FA head
        Shape(groups=(0, 0, 0)),  # no SWA head
        Shape(group=3, head_dim=24, page=32),  # rows to spare, padded head_dim
        Shape(group=1, groups=(2, 1, 0)),
    ):
        check(BATCHES["mixed"], shape, 21, 4)
        check(BATCHES["decoding"], shape, 21, 4)
        print(shape, flush=True)
    check(BATCHES["mixed"], Shape(), 21, 4, dtype=torch.float16, tolerance=5e-3)


if __name__ == "__main__":
    interpret()
