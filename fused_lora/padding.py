"""Rows of a matrix that start at multiples of 128 bytes: the copy engine wants 16, and reads others than 128 slower."""

from torch import Tensor


def padded(cols: int) -> int:
    """Elements of 16 bits from one such row to the next; of few columns rows start at multiples of 16 bytes only."""
    wide = -(-cols // 64) * 64
    return wide if (wide - cols) * 16 <= cols else -(-cols // 8) * 8


def empty(rows: int, cols: int, like: Tensor) -> Tensor:
    """(rows, cols) in like's dtype, on its device: part of a matrix with padded(cols) columns."""
    return like.new_empty(rows, padded(cols))[:, :cols]


def pad_rows_(weight: Tensor) -> None:
    """The same tensor object on memory with padded rows, where a Hopper's kernels would copy it in each pass."""
    if type(weight.data) is not Tensor or not weight.is_cuda or weight.element_size() != 2 or weight.dim() != 2:
        return
    if weight.shape[1] % 8 != 0 and (weight.stride(0) % 8 != 0 or weight.stride(1) != 1):
        weight.data = empty(*weight.shape, weight).copy_(weight.data)
