"""One layer of a hybrid's KV cache: FA heads keep every token, SWA heads their sinks and a ring of the last tokens.

In the storage of an SWA head, the token at position p of its sequence (counted without padding) occupies slot p if
p < num_sink_tokens, else slot num_sink_tokens + (p - num_sink_tokens) % window. So slot s is filled once position s has
been seen, and the storage holds exactly what the next query sees, besides its own token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from consa.attention.ops import kernels_for
from consa.cache.split import Heads, HeadSplit, by_start, pick, selector
from consa.errors import ConsaError

GROWTH = 64  # tokens; storage grows by this much, so copies cost a 64th of the reads of attention
STORAGE = ("full_keys", "full_values", "sliding_keys", "sliding_values")


class NewKeys(NamedTuple):
    """What `HybridLayer.update` hands to the attention function in place of keys: the cache and the tokens to write.

    The attention function writes the tokens: only it knows the padding, and so which tokens are a sequence's sinks.
    """

    cache: HybridLayer
    key: Tensor  # (batch, kv_heads, tokens, head_dim)
    value: Tensor

    def __getattr__(self, name: str) -> Any:  # another attention function would use it as a tensor
        raise AttributeError(
            f"no {name}: only a hybrid can use a HybridCache; use consa.load or consa.attached, or another cache"
        )


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys or values in the dtype that attention computes in: autocast's, if autocast is on.

    Under autocast, rotary embeddings return queries and keys in float32 while values have a lower precision.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


class HybridLayer(CacheLayerMixin):
    """One layer's keys and values, in storage that grows with the sequence.

    Args:
        split: which heads keep which tokens.

    Attributes:
        full_keys: `(batch, FA heads, capacity, head_dim)`, or None; `full_values` likewise.
        sliding_keys: `(batch, SWA heads, capacity, head_dim)`, or None; `sliding_values` likewise.
        length: tokens seen, including left padding.
        first: `(batch,)` on the CPU, column of each sequence's first real token; None without left padding.
    """

    is_sliding = False  # transformers sizes masks as for a layer that sees every token
    is_croppable = True
    length = 0
    full_keys: Any  # a tensor after the first write
    full_values: Any
    sliding_keys: Any
    sliding_values: Any

    def __init__(self, split: HeadSplit) -> None:
        super().__init__()
        self.split = split
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.full_keys = self.full_values = self.sliding_keys = self.sliding_values = None
        self.length = 0
        self._start(None)
        self._undo: list[_Undo] = []
        self._waiting = self._offload_after = False

    def _start(self, first: Tensor | None) -> None:
        """Store the columns where the sequences start."""
        if first is not None and not first.any():
            first = None
        self.first = first
        self._earliest, self._latest = (0, 0) if first is None else (int(first.min()), int(first.max()))
        self._first_there = None if first is None or not self.is_initialized else first.to(self.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first keys, `(batch, kv_heads, any, head_dim)`."""
        heads = (*self.split.full, *self.split.sliding)
        if len(heads) != key_states.shape[1]:
            raise ConsaError(
                f"the cache is for {len(heads)} KV heads per layer, the model has {key_states.shape[1]}; make the cache"
                " with the allocation of this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.full_heads: Heads = selector(self.split.full, self.device)
        self.sliding_heads: Heads = selector(self.split.sliding, self.device)
        self._has_kernels = kernels_for(key_states, key_states, value_states, None) is not None
        self._sorted_heads = torch.tensor(heads, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        """Pass the new tokens on to the attention function, which writes them; see `NewKeys`."""
        key_states, value_states = as_computed(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            # Storage made in inference mode cannot be written to outside of it; a copy can.
            self._replace_storage(lambda x: x.clone() if x.is_inference() else x)
        if torch.is_grad_enabled() and key_states.requires_grad and self.length:
            raise ConsaError("no gradient flows through cached keys; use torch.no_grad(), or use_cache=False")
        self._waiting = True
        return NewKeys(self, key_states, value_states), None

    def _replace_storage(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in STORAGE:
            if (storage := getattr(self, name)) is not None:
                setattr(self, name, change(storage))

    @property
    def is_empty(self) -> bool:
        """Whether no token has been written."""
        return self.length == 0

    def can_append(self, key: Tensor, first: Tensor | None) -> bool:
        """Whether `append` suffices: one new token per sequence, no padding, no past to record."""
        self._check_start(first)
        return key.shape[2] == 1 and self._latest <= self.length and not self.record_past

    def append(self, key: Tensor, value: Tensor) -> list[tuple[Heads, Tensor, Tensor, Tensor | None]]:
        """Write one token per sequence.

        Returns:
            For FA and for SWA heads, if there are any: the heads, their stored keys and values, and which keys are
            visible, bool `(batch, 1, 1, keys)`, or None for all.
        """
        key, value = key.detach(), value.detach()
        self._reserve(key, self.length + 1)
        parts = []
        if self.split.full:
            stored, visible = (self.full_keys, self.full_values), None
            for storage, new in zip(stored, (key, value), strict=True):
                storage[:, :, self.length] = pick(new, self.full_heads)[:, :, 0]
            if self._first_there is not None:
                column = torch.arange(self.length + 1, device=self.device)
                visible = column >= self._first_there[:, None, None, None]
            parts.append((self.full_heads, *(x[:, :, : self.length + 1] for x in stored), visible))
        if self.split.sliding:
            stored, visible = (self.sliding_keys, self.sliding_values), None
            sequence, slot = slice(None), self._slot(self.length)
            count = min(self.length + 1 - self._earliest, self.split.kept)
            if self._first_there is not None:
                position = self.length - self._first_there
                sequence, slot = torch.arange(len(key), device=self.device), self._slots_of(position)
                if self.length - self._latest + 1 < self.split.kept:
                    visible = torch.arange(count, device=self.device) <= position[:, None, None, None]
            for storage, new in zip(stored, (key, value), strict=True):
                storage[sequence, :, slot] = pick(new, self.sliding_heads)[:, :, 0]
            parts.append((self.sliding_heads, *(x[:, :, :count] for x in stored), visible))
        self.length += 1
        self._done()
        return parts

    def has_kernels(self, softcap: float | None) -> bool:
        """Whether `decode` can replace `append`."""
        return self._has_kernels and softcap is None and self.first is None

    def decode(self, q: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Write one token per sequence, `(batch, heads, 1, head_dim)`, and attend to the whole cache with Triton."""
        self._reserve(key, self.length + 1)
        out = self._decode(q, key, value, torch.full((), self.length, device=self.device), scaling)
        self.length += 1
        self._done()
        return out

    def _decode(self, q: Tensor, key: Tensor, value: Tensor, length: Tensor, scaling: float) -> Tensor:
        return torch.ops.consa.decode(
            q, key, value, self.full_keys, self.full_values, self.sliding_keys, self.sliding_values, self._sorted_heads,
            length, self.split.num_sink_tokens, self.split.window, scaling,
        )  # fmt: skip

    def read_sliding(self, rows: slice | Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of SWA heads for sequences that start at column `start`, in order of position."""
        seen, sinks = max(0, self.length - start), self.split.num_sink_tokens
        keys, values = self.sliding_keys[rows], self.sliding_values[rows]
        if seen <= self.split.kept:
            return keys[:, :, :seen], values[:, :, :seen]
        slots = (slice(sinks), slice(self._slot(seen), self.split.kept), slice(sinks, self._slot(seen)))
        keys, values = (torch.cat([x[:, :, part] for part in slots], dim=2) for x in (keys, values))
        return keys, values

    def write(self, key: Tensor, value: Tensor, first: Tensor | None) -> list[Tensor]:
        """Write any number of tokens per sequence, `(batch, kv_heads, tokens, head_dim)`; some may be padding.

        Returns:
            Keys and values of the FA heads, `(batch, FA heads, tokens seen, head_dim)`; [] without FA heads.
        """
        self._check_start(first)
        key, value = key.detach(), value.detach()
        end = self.length + key.shape[2]
        self._reserve(key, end)
        if self.split.full:
            self.full_keys[:, :, self.length : end] = pick(key, self.full_heads)
            self.full_values[:, :, self.length : end] = pick(value, self.full_heads)
        if self.split.sliding:
            key, value = pick(key, self.sliding_heads), pick(value, self.sliding_heads)
            if self.record_past:
                self._remember(key, value)
            self._write_sliding(key, value)
        self.length = end
        full = [x[:, :, :end] for x in (self.full_keys, self.full_values) if x is not None]
        self._done()  # after slicing: `full` stays valid if the storage is offloaded now
        return full

    def _write_sliding(self, key: Tensor, value: Tensor) -> None:
        """Write keys and values of SWA heads at columns from `length` on."""
        for rows, start in by_start(self.first):
            slots, newest = self._slots(self.length - start, self.length - start + key.shape[2])
            for storage, new in ((self.sliding_keys, key), (self.sliding_values, value)):
                if self.first is None:
                    storage.index_copy_(2, slots, new[:, :, newest])
                else:
                    storage[rows] = storage[rows].index_copy(2, slots, new[rows][:, :, newest])

    def _slots(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Slots of positions `begin <= p < end` that this write fills and keeps, and the indices of their tokens."""
        sinks = self.split.num_sink_tokens
        position = torch.arange(max(begin, 0), end, device=self.device)
        position = position[(position < sinks) | (position >= end - self.split.window)]
        return self._slots_of(position), position - begin

    def _slots_of(self, position: Tensor) -> Tensor:
        sinks, window = self.split.num_sink_tokens, self.split.window
        return torch.where(position < sinks, position, sinks + (position - sinks) % window)

    def _slot(self, position: int) -> int:
        sinks = self.split.num_sink_tokens
        return position if position < sinks else sinks + (position - sinks) % self.split.window

    def _capacity(self, tokens: int) -> int:
        return -(-tokens // GROWTH) * GROWTH

    def _reserve(self, like: Tensor, tokens: int) -> None:
        """Make room for `tokens` columns."""
        self._grow("full", len(self.split.full), like, self._capacity(tokens))
        most = min(self._capacity(max(0, tokens - self._earliest)), self.split.kept)
        self._grow("sliding", len(self.split.sliding), like, most)

    def _grow(self, kind: str, num_heads: int, like: Tensor, capacity: int) -> None:
        old = getattr(self, f"{kind}_keys")
        if num_heads == 0 or (old is not None and old.shape[2] >= capacity):
            return
        # Zeros where a mask hides unwritten slots: their weight is 0, but 0 times an arbitrary value may be NaN.
        make = like.new_zeros if kind == "sliding" or self.is_compileable else like.new_empty
        for name in (f"{kind}_keys", f"{kind}_values"):
            old = getattr(self, name)
            new = make(like.shape[0], num_heads, capacity, like.shape[3])
            if old is not None:
                new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def _check_start(self, first: Tensor | None) -> None:
        if first is None and self.first is None:
            return
        if self.length:
            before, now = (torch.zeros(1) if x is None else x.clamp(max=self.length) for x in (self.first, first))
            # A sequence that was all padding may start now.
            if before.shape != now.shape or not torch.equal(before, now):
                raise ConsaError(
                    "the attention mask has the first tokens of the sequences in other columns than before; pass the"
                    " mask of the whole text, including padding"
                )
        if first is not self.first:
            self._start(first)

    def _done(self) -> None:
        self._waiting = False
        if self._offload_after:
            self._offload_after = False
            self.offload()

    # The interface that transformers requires of a layer.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns that a mask covers, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """Maximum number of tokens; -1 means no limit."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._each_sequence(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in this order."""
        self._each_sequence(lambda x: x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def _each_sequence(self, change: Callable[[Tensor], Tensor]) -> None:
        self._replace_storage(change)
        if self.first is not None:
            self._start(change(self.first))
        self._undo.clear()  # they belong to the former sequences

    def offload(self) -> None:
        """Move the storage to the CPU, after the pending attention if there is one."""
        if self._waiting:
            self._offload_after = True
        else:
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the storage back to its device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        def moved(x: Tensor) -> Tensor:
            # Copies to the CPU are blocking: another stream may fetch them back.
            x = x.to(device, non_blocking=device.type != "cpu")
            if x.is_cuda:
                # The other stream must not reuse the memory while attention reads it on the default stream.
                x.record_stream(torch.cuda.default_stream(device))
            return x

        self._replace_storage(moved)

    def activate_past_recording(self) -> None:
        """From now on record overwritten tokens so that `crop` can restore them; each `crop` clears the record."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, or all if there are fewer.

        Raises:
            ConsaError: SWA heads have dropped tokens that they would need.
        """
        if tokens_to_remove > 0:
            raise ConsaError(f"crop needs a negative number of tokens to remove, got {tokens_to_remove}")
        length = self.length + tokens_to_remove
        if length <= 0:
            self.reset()
            return
        dropped = self.split.sliding and self.length - self._earliest > self.split.kept
        if dropped and length < self.length:
            if not self._undo or self._undo[0].length > length:
                raise ConsaError(
                    f"cannot remove {-tokens_to_remove} tokens: SWA heads have dropped earlier tokens; call"
                    " activate_past_recording() before generating them"
                )
            while self.length > length:
                last = self._undo.pop()
                self.sliding_keys.index_copy_(2, last.slots, last.old_keys)
                self.sliding_values.index_copy_(2, last.slots, last.old_values)
                self.length = last.length
                stay = max(0, length - last.length)
                self._write_sliding(last.new_keys[:, :, :stay], last.new_values[:, :, :stay])
                self.length += stay
        self.length = length
        self._undo.clear()

    def _remember(self, key: Tensor, value: Tensor) -> None:
        """Record the tokens that SWA heads are about to overwrite, and the new ones."""
        if self.first is None:
            slots, _ = self._slots(self.length, self.length + key.shape[2])
        else:  # each sequence has its own
            slots = torch.arange(self.sliding_keys.shape[2], device=self.device)
        old = [x.index_select(2, slots) for x in (self.sliding_keys, self.sliding_values)]
        self._undo.append(_Undo(self.length, slots, old[0], old[1], key, value))


class _Undo(NamedTuple):
    """One write to the storage of SWA heads: length before it, slots, old and new tokens."""

    length: int
    slots: Tensor
    old_keys: Tensor
    old_values: Tensor
    new_keys: Tensor
    new_values: Tensor
