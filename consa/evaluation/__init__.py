"""What an allocation costs: losses by position, side by side."""
