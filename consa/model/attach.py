"""Attach an allocation to a loaded model, and take it off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.model import interface
from consa.model.layout import attention_layout, check_fits
from consa.model.plan import Plan


@contextmanager
def attached(model: PreTrainedModel, allocation: Allocation) -> Iterator[Plan]:
    """Within the block, `model` computes the exact hybrid attention of `allocation`; on exit it is as before.

    Args:
        model: a causal language model of transformers, loaded with any attention implementation.
        allocation: which KV heads keep full attention.

    Yields:
        The `Plan` that the model's attention layers follow.

    Raises:
        UnsupportedModelError: consa cannot take this model's attention over exactly.
        InvalidAllocationError: the allocation was made for a model of another shape.
    """
    layout = attention_layout(model)
    check_fits(allocation, layout, type(model).__name__)
    modules: list[Any] = [model.get_submodule(name) for name in layout.names]
    if interface.allocation_of(model.config) is not None:
        raise ConsaError(
            f"{type(model).__name__} was converted with an allocation of its own; load the original"
        )
    if any(hasattr(module, "consa_plan") for module in modules):
        raise ConsaError(f"{type(model).__name__} already has an allocation attached; leave that block first")
    before: Any = model.config._attn_implementation
    plan = Plan(allocation)
    try:
        model.set_attn_implementation(interface.NAME)
        for module in modules:
            module.consa_plan = plan
        yield plan
    finally:
        for module in modules:
            module.__dict__.pop("consa_plan", None)
        model.set_attn_implementation(before)


Observer = Callable[[int, Tensor, Tensor, float, float | None], None]
"""What `observed` calls, with the layer, its queries `(batch, q_heads, queries, head_dim)`, its keys
`(batch, kv_heads, keys, head_dim)`, the factor on the scores, and their bound by tanh or None."""


@contextmanager
def observed(model: PreTrainedModel, allocation: Allocation, observer: Observer) -> Iterator[None]:
    """As `attached`, and each layer shows `observer` what it attends with before it does."""
    with attached(model, allocation) as plan:
        attend = plan.attend

        def show_and_attend(layer: int, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            *_, scaling, softcap = rest
            observer(layer, q, k, scaling, softcap)
            return attend(layer, q, k, *rest)

        # Of this plan alone, which ends with the block; it is called by place.
        plan.attend = show_and_attend  # pyright: ignore[reportAttributeAccessIssue]
        yield


def make_dense(model: PreTrainedModel) -> None:
    """Have a converted hybrid compute as the dense model of its weights, in place; other models stay as they are."""
    for module in model.modules():
        vars(module).pop("consa_plan", None)
    if vars(model.config).pop("consa", None):
        model.set_attn_implementation("eager" if has_softcap(model) else "sdpa")


def has_softcap(model: PreTrainedModel) -> bool:
    """Whether scores are bounded. sdpa bounds none: transformers from 5.21 on refuses it then, before it chooses it."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None
