"""Whether torch's compiler can work on this machine's CPU."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

# It calls g++, with paths of torch's own that it does not quote.
COMPILES = shutil.which(os.environ.get("CXX", "g++")) is not None and " " not in torch.__path__[0]
needs_compiler = pytest.mark.skipif(not COMPILES, reason="needs g++, and torch in a path without spaces")
