"""How each kind of result is told in docs/RESULTS.md."""
