"""How tests compare numbers, and how they see what a computation holds in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_close(
    actual: Tensor | None, wanted: Tensor, tolerance: float = 1e-5, name: str = "result", *, floor: float = 1e-30
) -> None:
    """The largest difference is at most `tolerance` times the largest number wanted.

    Numbers wanted count as `floor` at least: what cancels out to zero is compared with the size of what cancels.
    """
    actual = torch.zeros_like(wanted) if actual is None else actual  # a gradient that nothing flowed to
    assert actual.shape == wanted.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    actual, wanted = actual.detach().double().cpu(), wanted.detach().double().cpu()
    assert actual.isfinite().all(), f"{name} is not finite"
    error = float((actual - wanted).abs().max()) / max(float(wanted.abs().max()), floor)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


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
