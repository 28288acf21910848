"""Importing this module lets `AutoModelForCausalLM.from_pretrained` load hybrids."""

import consa.model.register  # noqa: F401
