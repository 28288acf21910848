"""What an allocation costs: losses by position and domain, retrieval, lm-eval's tasks, side by side."""
