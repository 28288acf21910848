"""Import this to let `AutoModelForCausalLM.from_pretrained` load hybrids; `consa.model.register` does the work."""

import consa.model.register  # noqa: F401
