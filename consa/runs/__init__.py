"""Run folders: what the commands load, make, measure and write."""
