"""What a hybrid saves, measured beside the dense model."""
