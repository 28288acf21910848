"""Measure what each KV head attends to, and relate it to allocations."""
