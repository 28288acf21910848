"""What each head attends to, and how that goes with an allocation."""
