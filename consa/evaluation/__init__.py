"""Measure what an allocation costs: losses by position and domain, retrieval, lm-eval tasks, in one table."""
