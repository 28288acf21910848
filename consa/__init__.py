"""Turn a pretrained LLM into a hybrid of full attention and sliding-window attention, with the split learned.

Importing consa is instant and changes nothing: torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consa import rules as rules
    from consa.adaptation import adapt as adapt
    from consa.allocation import Allocation as Allocation
    from consa.cache import HybridCache as HybridCache
    from consa.checkpoint import convert as convert
    from consa.checkpoint import load as load
    from consa.config import AdaptConfig as AdaptConfig
    from consa.config import LearnConfig as LearnConfig
    from consa.errors import ConsaError as ConsaError
    from consa.learning import learn as learn
    from consa.model import attached as attached

__version__ = "0.1.0"

_HOMES = {  # public name -> the module it comes from, or is
    "AdaptConfig": "consa.config",
    "Allocation": "consa.allocation",
    "ConsaError": "consa.errors",
    "HybridCache": "consa.cache",
    "LearnConfig": "consa.config",
    "adapt": "consa.adaptation",
    "attached": "consa.model",
    "convert": "consa.checkpoint",
    "learn": "consa.learning",
    "load": "consa.checkpoint",
    "rules": "consa.rules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
