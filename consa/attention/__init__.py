"""Hybrid attention: one semantics (`masks`), one plain truth (`reference`), a portable and a fused path, a cache."""
