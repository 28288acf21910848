"""Hybrid attention: one semantics (`masks`), one plain truth (`reference`), one portable path (`hybrid`)."""
