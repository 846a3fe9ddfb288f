"""Parameters that FSDP2 keeps in shards by rows: each rank merges its own rows of W and B, with the whole of A."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def check_rows(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that is cut otherwise than by rows."""
    for placement in getattr(tensor, "placements", ()):
        if not isinstance(placement, Replicate) and placement != Shard(0):
            raise ValueError(f"{name} must be sharded by rows, as fully_shard does, got {placement}")


def reshard(model: nn.Module) -> None:
    """Puts the shards in the place of whole parameters, which a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's rows; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def keep(tensor: Tensor, values: Tensor) -> None:
    """Sets a tensor to values that every rank has: of a sharded one, this rank's rows."""
    if is_sharded(tensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local(tensor).copy_(values)
