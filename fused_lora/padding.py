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


def pad_rows_(weight: Tensor) -> None:
    """The same tensor object on memory with padded rows, where Hopper's kernels would copy it in each pass.

    Only for a 16-bit matrix on a GPU with a number of columns that is no multiple of 8. What shares its memory with
    others, is of a subclass or does not fit a second time stays where it is.
    """
    data = weight.data
    if type(data) is not Tensor or not data.is_cuda or data.element_size() != 2 or data.dim() != 2:
        return
    alone = data.is_contiguous() and data.untyped_storage().nbytes() == data.numel() * data.element_size()
    if data.shape[1] % 8 == 0 or not alone:
        return
    try:
        weight.data = empty(*data.shape, data).copy_(data)
    except torch.OutOfMemoryError:
        return
