"""The KV cache of a hybrid."""
