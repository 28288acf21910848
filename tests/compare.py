"""How tests compare numbers, and how they see what a computation holds in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5, name: str = "result") -> None:
    """The largest difference is at most `tolerance` times the largest number wanted."""
    assert actual.shape == wanted.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    actual, wanted = actual.detach().double().cpu(), wanted.detach().double().cpu()
    assert actual.isfinite().all(), f"{name} is not finite"
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    error = float((actual - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), f"{name}: relative error {error / max(scale, 1e-30):.2e}"


class Elements(TorchDispatchMode):
    """Counts the elements that operations allocate while it is active; views of what exists cost nothing.

    Attributes:
        largest: elements of the largest tensor.
        total: elements of all of them, each counted once per operation that makes it.
        shapes: of all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        for made in _tensors(result):
            if made.untyped_storage().data_ptr() not in given:
                elements = made.untyped_storage().nbytes() // made.element_size()
                self.largest = max(self.largest, elements)
                self.total += elements
                self.shapes.append(tuple(made.shape))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []
