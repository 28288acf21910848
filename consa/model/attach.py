"""Attach an allocation to a loaded model, and detach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.model import interface
from consa.model.layout import attention_layout, check_fits
from consa.model.plan import Observer, Plan


@contextmanager
def attached(model: PreTrainedModel, allocation: Allocation, *, observer: Observer | None = None) -> Iterator[Plan]:
    """Within the block, `model` computes the exact hybrid attention of `allocation`; on exit it is restored.

    Args:
        model: a causal language model of transformers, loaded with any attention implementation.
        allocation: which KV heads keep full attention.
        observer: called by each layer before it attends.

    Yields:
        The `Plan` that the model's attention layers follow.

    Raises:
        UnsupportedModelError: consa cannot take over this model's attention exactly.
        InvalidAllocationError: the allocation was made for a model of another shape.
    """
    layout = attention_layout(model)
    check_fits(allocation, layout, type(model).__name__)
    modules: list[Any] = [model.get_submodule(name) for name in layout.names]
    if interface.allocation_of(model.config) is not None:
        raise ConsaError(
            f"{type(model).__name__} is a converted hybrid with its own allocation; load the original model"
        )
    if any(hasattr(module, "consa_plan") for module in modules):
        raise ConsaError(f"{type(model).__name__} already has an allocation attached; leave that `with` block first")
    before: Any = model.config._attn_implementation
    plan = Plan(allocation, observer)
    try:
        model.set_attn_implementation(interface.NAME)
        for module in modules:
            module.consa_plan = plan
        yield plan
    finally:
        for module in modules:
            module.__dict__.pop("consa_plan", None)
        model.set_attn_implementation(before)


def make_dense(model: PreTrainedModel) -> None:
    """Turn a converted hybrid into the dense model of its weights, in place; other models stay as they are."""
    for module in model.modules():
        vars(module).pop("consa_plan", None)
    if vars(model.config).pop("consa", None):
        model.set_attn_implementation("eager" if has_softcap(model) else "sdpa")


def has_softcap(model: PreTrainedModel) -> bool:
    """Whether the model bounds its scores, which sdpa cannot; transformers before 5.21 selects sdpa regardless."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None
