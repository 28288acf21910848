"""The same run on several processes, started by `torchrun` or `accelerate launch`, with the result of one process.

Without such a launcher there is one process, and nothing here costs anything. With several, each computes its share of
every step's sequences and gradients are added up, so that all hold the same weights and gates. Only the main process
shows progress and writes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from consa.config import MicroBatch, at_once
from consa.errors import ConsaError
from consa.model.layout import decoder_layers

PATIENCE = timedelta(hours=2)  # others wait while the main process measures; the launcher notices crashes


@contextmanager
def group(device: str | None = None) -> Iterator[None]:
    """Join the other processes of this job within the block, each on its own GPU; ConsaError if that is impossible."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1 or dist.is_initialized():
        yield
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.index is not None:
        raise ConsaError(f"device must not name a single GPU for {num_processes} processes, got {device!r}; use 'cuda'")
    if kind.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConsaError(
                f"process {local_rank} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()};"
                " start fewer processes"
            )
        torch.cuda.set_device(local_rank)
    # Name both backends: some versions of torch leave tensors on the CPU without one.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo has no class for them
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in lost):
            raise
        raise ConsaError(
            f"process {rank()} lost the other processes of this job: one of them ended, see its message;"
            " the same command resumes from its last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


_alone = False  # whether the block of `alone` runs


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process computes as if it were the only one, and waits for no other."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_main() -> bool:
    """Whether this process shows and writes."""
    return rank() == 0


def share(count: int) -> slice:
    """The indices of this process among `count` items, which the processes share evenly."""
    each = count // world_size()
    return slice(rank() * each, (rank() + 1) * each)


def check_divides(sequences_per_step: int, micro_batch: MicroBatch) -> None:
    """Raise ConsaError unless every process gets as many whole micro-batches of a step's sequences."""
    if sequences_per_step % (world_size() * at_once(micro_batch)):
        raise ConsaError(
            f"sequences_per_step must be a multiple of {world_size()} processes x micro_batch {at_once(micro_batch)},"
            f" got {sequences_per_step}; start fewer processes or take more sequences"
        )


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all processes; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """The rows of `tensor`, which lies on the CPU, of all processes, in the order of their ranks."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def check_same(value: Any, what: str) -> None:
    """Raise ConsaError, on every process, unless `value` is the same on all."""
    if world_size() > 1:
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise ConsaError(f"{what} differs between processes")


def from_main(tensor: Tensor) -> Tensor:
    """The main process's `tensor`, which lies on the CPU."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, so that the others find its result in a cache."""
    if world_size() > 1 and not is_main():
        dist.barrier()
    yield
    if world_size() > 1 and is_main():
        dist.barrier()


@contextmanager
def sharded(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yields a copy of `model` whose decoder layers are sharded over the processes (FSDP2); one process needs no copy.

    `model` gets the copy's weights once the block has succeeded. A layer's weights, gradients and optimizer states are
    float32 and spread over the processes; it is gathered, in the model's dtype, while it computes. Embeddings, the last
    norm and the output layer stay whole on every process.
    """
    if world_size() == 1:
        yield model
        return
    trained = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(trained):
        fully_shard(layer.float(), mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)  # a sum, as of the gradients that are not sharded
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other
    whole = {parameter for parameter in trained.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(trained.base_model, ignored_params=whole)  # lets the layers gather ahead of time
    yield trained
    parameters = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gathered(parameters[name]))


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, example: Tensor) -> Tensor:
    """`whole`, which every process has, on the device and with the sharding of `example`."""
    whole = whole.to(example.device)
    if not isinstance(example, DTensor):
        return whole
    return distribute_tensor(whole, example.device_mesh, example.placements, src_data_rank=None)
