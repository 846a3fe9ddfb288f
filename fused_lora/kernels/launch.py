"""The one place where a kernel is launched or its launch recorded, and where operands become TMA descriptors."""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Gpu

_records: ContextVar[list | None] = ContextVar("launch_records", default=None)


@dataclass(frozen=True)
class Launch:
    """What kernel[grid](*args, **meta) would have been called with."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    meta: dict

    @property
    def name(self) -> str:
        return getattr(self.kernel, "fn", self.kernel).__name__


def launch(kernel, grid, args, meta):
    """kernel[grid](*args, **meta); inside record_launches, only its record."""
    records = _records.get()
    if records is None:
        kernel[grid](*args, **meta)
    else:
        records.append(Launch(kernel, grid, args, meta))


@contextmanager
def record_launches():
    """A list that collects the launches of the block, none of which runs: with tensors on `meta`, what would happen."""
    records: list[Launch] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def tma_ready(tensor, gpu: Gpu) -> bool:
    """Whether the copy engine can address a matrix: 16-bit, rows contiguous, 16-byte aligned and not overlapping."""
    row, col = tensor.stride()
    return (
        gpu.has_tma
        and tensor.element_size() == 2
        and col == 1
        and row >= tensor.shape[1]
        and row % 8 == 0
        and tensor.data_ptr() % 16 == 0
    )


def operand(tensor, block, tma: bool):
    """A matrix as a kernel argument: itself, or its descriptor in blocks of `block`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)) if tma else tensor
