"""The processes that train one model, each with its part of every batch: one, or those of torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among them, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """A rank's sequences of a batch."""
        if batch_size % self.world:
            raise ValueError(f"batch_size must be a multiple of the {self.world} ranks, got {batch_size}")
        return batch_size // self.world

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows."""
        return batch.split(self.share(len(batch)))[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """For every rank to be here."""
        if self.world > 1:
            distributed.barrier()

    def replica(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks."""
        return DistributedDataParallel(model) if self.world > 1 else model


def accumulating(replica: nn.Module, last: bool):
    """Around a micro-batch: gradients travel between ranks with the last one of a step only."""
    waits = isinstance(replica, DistributedDataParallel) and not last
    return replica.no_sync() if waits else nullcontext()


@contextmanager
def joined(device_type: str) -> Iterator[Ranks]:
    """The ranks that torchrun's variables speak of, in touch with each other inside."""
    many = distributed.is_torchelastic_launched()
    index = distributed.get_node_local_rank() if many else 0
    device = torch.device(device_type, index if device_type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not many:
        yield Ranks(device)
        return
    # Long enough for the first rank to make the tokens of a large text.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    try:
        yield Ranks(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
