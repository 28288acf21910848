"""Turn a pretrained LLM into a hybrid of full attention and sliding-window attention, with the split learned.

Importing consa is instant and changes nothing: torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consa import rules as rules
    from consa.allocation import Allocation as Allocation
    from consa.cache.hybrid import HybridCache as HybridCache
    from consa.config import AdaptConfig as AdaptConfig
    from consa.config import LearnConfig as LearnConfig
    from consa.errors import ConsaError as ConsaError
    from consa.model.attach import attached as attached
    from consa.model.convert import convert as convert
    from consa.model.convert import load as load
    from consa.training.adaptation import adapt as adapt
    from consa.training.learning import learn as learn

__version__ = "0.1.0"

_HOMES = {  # public name -> the module it comes from, or is
    "AdaptConfig": "consa.config",
    "Allocation": "consa.allocation",
    "ConsaError": "consa.errors",
    "HybridCache": "consa.cache.hybrid",
    "LearnConfig": "consa.config",
    "adapt": "consa.training.adaptation",
    "attached": "consa.model.attach",
    "convert": "consa.model.convert",
    "learn": "consa.training.learning",
    "load": "consa.model.convert",
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
