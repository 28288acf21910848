"""Serving hybrids with an engine of its own KV cache."""
