"""Turn a pretrained LLM into a hybrid of full attention and sliding-window attention, with the split learned.

Importing consa is instant and changes nothing. Each public name imports torch and transformers on first use if it needs
them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consa import rules as rules
    from consa.allocation import Allocation as Allocation
    from consa.api import adapt as adapt
    from consa.api import evaluate as evaluate
    from consa.api import learn as learn
    from consa.api import sweep as sweep
    from consa.cache.hybrid import HybridCache as HybridCache
    from consa.config import AdaptConfig as AdaptConfig
    from consa.config import LearnConfig as LearnConfig
    from consa.errors import ConsaError as ConsaError
    from consa.model.attach import attached as attached
    from consa.model.convert import convert as convert
    from consa.model.convert import load as load

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it, or that it is
    "AdaptConfig": "consa.config",
    "Allocation": "consa.allocation",
    "ConsaError": "consa.errors",
    "HybridCache": "consa.cache.hybrid",
    "LearnConfig": "consa.config",
    "adapt": "consa.api",
    "attached": "consa.model.attach",
    "convert": "consa.model.convert",
    "evaluate": "consa.api",
    "learn": "consa.api",
    "load": "consa.model.convert",
    "rules": "consa.rules",
    "sweep": "consa.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value  # the next access bypasses this function
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, *(name for name in globals() if name.startswith("__"))])
