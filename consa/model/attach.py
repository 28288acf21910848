"""Attach an allocation to a loaded model, and detach it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.model import interface
from consa.model.layout import attention_layout, check_fits
from consa.model.plan import Observer, Plan
from consa.model.register import INTERNAL


def attached(
    model: PreTrainedModel, allocation: Allocation, *, observer: Observer | None = None
) -> AbstractContextManager[Plan]:
    """Within the block, `model` computes the exact hybrid attention of `allocation`; on exit it is restored.

    Args:
        model: a causal language model of transformers, loaded with any attention implementation.
        allocation: which KV heads keep full attention.
        observer: called by each layer before it attends.

    Returns:
        A context manager that yields the `Plan` that the model's attention layers follow.

    Raises:
        UnsupportedModelError: consa cannot take over this model's attention exactly.
        InvalidAllocationError: the allocation was made for a model of another shape.
    """
    return _Attachment(model, allocation, observer)


class _Attachment(AbstractContextManager[Plan]):
    """What `attached` returns. A generator would detach the model when it is garbage-collected."""

    def __init__(self, model: PreTrainedModel, allocation: Allocation, observer: Observer | None) -> None:
        self._model, self._allocation, self._observer = model, allocation, observer

    def __enter__(self) -> Plan:
        name = type(self._model).__name__
        layout = attention_layout(self._model)
        check_fits(self._allocation, layout, name)
        self._modules: list[Any] = [self._model.get_submodule(name) for name in layout.names]
        if interface.allocation_of(self._model.config) is not None:
            raise ConsaError(f"{name} is a converted hybrid with its own allocation; load the original model")
        if any(hasattr(module, "consa_plan") for module in self._modules):
            raise ConsaError(f"{name} already has an allocation attached; leave that `with` block first")
        self._before = [(fields, fields[INTERNAL]) for fields in _configs(self._model)]
        plan = Plan(self._allocation, self._observer)
        for module in self._modules:
            module.consa_plan = plan
        for fields, _ in self._before:
            fields[INTERNAL] = interface.NAME
        return plan

    def __exit__(self, *exception: object) -> None:
        for module in self._modules:
            vars(module).pop("consa_plan", None)
        for fields, attention in self._before:
            fields[INTERNAL] = attention


def _configs(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The fields of the configs of a model and its submodels."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return [vars(config) for config in configs.values()]


def make_dense(model: PreTrainedModel) -> None:
    """Turn a converted hybrid into the dense model of its weights, in place; other models stay as they are."""
    for module in model.modules():
        vars(module).pop("consa_plan", None)
    if vars(model.config).pop("consa", None):
        for fields in _configs(model):
            fields[INTERNAL] = "eager" if has_softcap(model) else "sdpa"


def has_softcap(model: PreTrainedModel) -> bool:
    """Whether the model bounds its scores, which sdpa cannot; transformers before 5.21 selects sdpa regardless."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None
