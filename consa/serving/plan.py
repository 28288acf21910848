"""How vLLM is to hold a hybrid's KV cache. Nothing here imports vLLM.

vLLM plans a cache per window and shares out pages of equal size. Every KV head has a place of its own, which keeps all
tokens (FA) or sinks and window (SWA). vLLM puts places that keep the same into groups of equal size, and a request
holds pages of a group, each a page of every place in it. So that all FA heads are one group, unused places are added
until the number of SWA places is a multiple of the number of FA heads: the FA heads then fill one group, and the SWA
places one or more.
"""

from __future__ import annotations

DECODING_TOKENS = 2  # of a decoding request in flight: vLLM schedules a step while the one before runs


def unused_places(num_full: int, num_sliding: int) -> int:
    """SWA places to add, so that their number is a multiple of the number of FA heads."""
    return -num_sliding % num_full if num_full else 0
