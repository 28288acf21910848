"""Learning an allocation, and training a hybrid on."""
