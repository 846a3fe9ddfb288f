"""Rows of a matrix that start at multiples of 128 bytes: the copy engine wants 16, and reads others than 128 slower."""

import torch
from torch import Tensor


def padded(cols: int) -> int:
    """Elements of 16 bits from one such row to the next; of few columns rows start at multiples of 16 bytes only."""
    wide = -(-cols // 64) * 64
    return wide if (wide - cols) * 16 <= cols else -(-cols // 8) * 8


def empty(rows: int, cols: int, like: Tensor) -> Tensor:
    """(rows, cols) in like's dtype of 16 bits, on its device: part of a matrix with padded(cols) columns."""
    return like.new_empty(rows, padded(cols))[:, :cols]


def by_default() -> bool:
    """Not where a process group is: FSDP takes dense parameters only, and its first version misreads padded ones."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def is_alone(tensor: Tensor) -> bool:
    """Whether it is all of its memory, and nothing else is in it: no view, tied weight, state dict or other library."""
    storage = tensor.untyped_storage()
    if not tensor.is_contiguous() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return False
    # Two hold it: the tensor, and `storage` here. Memory that another library lent cannot be resized.
    return torch._C._storage_Use_Count(storage._cdata) == 2 and storage.resizable()


def pad_rows_(weight: Tensor) -> None:
    """The same tensor object on memory with padded rows, where Hopper's kernels would copy it in each pass.

    Only for a 16-bit matrix on a GPU with a number of columns that is no multiple of 8. What may share its memory with
    others, is of a subclass or does not fit a second time stays where it is.
    """
    if type(weight.data) is not Tensor or not weight.is_cuda or weight.element_size() != 2 or weight.dim() != 2:
        return
    if weight.shape[1] % 8 == 0 or not is_alone(weight):
        return
    try:
        weight.data = empty(*weight.shape, weight.data).copy_(weight.data)
    except torch.OutOfMemoryError:
        return
