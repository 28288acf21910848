"""Hybrid attention: the semantics (`masks`), the ground truth (`reference`), and the fast paths (`ops`)."""
