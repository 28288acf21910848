"""The study behind docs/RESULTS.md: how well learned allocations do, beside what else, and why.

Each module is a command, run from the root of a clone: `python -m research.methods --help`. README.md lists them.
"""
