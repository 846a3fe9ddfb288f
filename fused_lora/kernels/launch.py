"""How kernels are launched: plans made once per layout of the operands, TMA descriptors, and launches recorded dry.

A first launch goes through Triton's JIT. Later ones of the same plan go straight to the compiled kernel: all that the
JIT would look at again (types, alignment, divisibility, constants) is in the plan's key. They make the call that the
JIT makes itself in the end, so that nothing here depends on how a version of Triton packs arguments.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Gpu

_records: ContextVar[list | None] = ContextVar("launch_records", default=None)


class Layout(NamedTuple):
    """All of a matrix that tile choice and compilation depend on; aligned is 16-byte alignment of its first element."""

    rows: int
    cols: int
    stride_row: int
    stride_col: int
    dtype: torch.dtype
    device: torch.device
    aligned: bool

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Layout":
        return cls(*matrix.shape, *matrix.stride(), matrix.dtype, matrix.device, matrix.data_ptr() % 16 == 0)

    @property
    def strides(self) -> tuple[int, int]:
        return self.stride_row, self.stride_col

    def tma_ready(self, gpu: Gpu) -> bool:
        """Whether the copy engine can address it: 16-bit, rows contiguous, 16-byte aligned and not overlapping."""
        return (
            gpu.has_tma
            and self.dtype.itemsize == 2
            and self.stride_col == 1
            and self.stride_row >= self.cols
            and self.stride_row % 8 == 0
            and self.aligned
        )


def is_wide(*layouts: Layout) -> bool:
    """Whether an offset into one of them may pass 2^31 elements, with a block of 2^10 rows or columns to spare."""
    return any((m.rows + 1024) * m.stride_row + (m.cols + 1024) * m.stride_col >= 2**31 for m in layouts)


def in_eights(*layouts: Layout) -> bool:
    """Whether all of them are rows of 16-byte pieces: contiguous, aligned, of 8 or 16 or 24 ... entries."""
    return all(m.stride_col == 1 and m.stride_row % 8 == 0 and m.cols % 8 == 0 and m.aligned for m in layouts)


def only_in_eights(*layouts: Layout) -> bool:
    """in_eights, but not in sixteens, which Triton sees by itself."""
    return in_eights(*layouts) and any(m.stride_row % 16 or m.cols % 16 for m in layouts)


def dense(rows: int, cols: int, like: Layout) -> Layout:
    """The layout of torch.empty(rows, cols)."""
    return Layout(rows, cols, cols, 1, like.dtype, like.device, True)


def pointers_aligned(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """The part of a plan's key for operands without a layout: None, or its 16-byte alignment."""
    return tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors)


class Plan:
    """kernel[grid](*args, **meta) with everything but the tensors fixed.

    blocks are the descriptor blocks of the leading matrix arguments, None for one passed by pointer; sizes the
    integers that close the arguments before the constants.
    """

    def __init__(self, kernel, grid: tuple[int, ...], meta: dict, blocks: tuple = (), sizes: tuple[int, ...] = ()):
        self.kernel, self.grid, self.meta, self.blocks, self.sizes = kernel, grid, meta, blocks, sizes
        self._constants = tuple(meta[name] for name in kernel.arg_names if name in meta)
        self._has_descriptors = any(blocks)
        self._compiled = None

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def arguments(self, matrices: tuple, rest: tuple) -> tuple:
        if self._has_descriptors:
            matrices = [
                m if block is None else _descriptor(m, block) for m, block in zip(matrices, self.blocks, strict=True)
            ]
        return (*matrices, *rest, *self.sizes)

    def load(self, matrices: tuple, rest: tuple = ()) -> None:
        """Compiles the kernel and puts it on the device, so that a run cannot fail for want of either."""
        if _records.get() is None and self._compiled is None:
            compiled = self.kernel.warmup(*self.arguments(matrices, rest), grid=self.grid, **self.meta)
            if compiled is not None:  # as it is under the interpreter
                compiled._init_handles()
                self._compiled = compiled

    def over(self, grid: tuple[int, ...]) -> "Plan":
        """The same over another grid, with what is compiled already."""
        plan = copy.copy(self)
        plan.grid = grid
        return plan

    def run(self, matrices: tuple, rest: tuple = ()) -> None:
        args = self.arguments(matrices, rest)
        records = _records.get()
        if records is not None:
            records.append((self, args))
        elif self._compiled is None:
            self._compiled = self.kernel[self.grid](*args, **self.meta)
        else:
            start(self._compiled, self.grid, (*args, *self._constants))


def start(compiled, grid: tuple[int, int, int], args: tuple) -> None:
    """compiled[grid](*args), which prepares every launch for hooks; where none is set (a profiler sets them), without.

    36 arguments on a CPU at hand, without Triton's C: 12 us, and 3 so.
    """
    if _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook):
        compiled[grid](*args)
        return
    run = compiled.run  # loads the kernel, which then has a function
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def _is_set(hook) -> bool:
    """A chain of hooks may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


# 1.6 KB each: a model of ten layer shapes has 60 for each count of tokens.
MOST_PLANS = 8192


class Recent:
    """What was made under the keys that were used last: at most `most` of them, and at least half as many.

    Two dicts: a key that is used moves to the young one. Where that is half of all, it becomes the old one, and what
    only the old one had is forgotten. So a key that is found costs what it costs in a dict.
    """

    def __init__(self, most: int):
        self.half = most // 2
        self.young: dict[tuple, object] = {}
        self.old: dict[tuple, object] = {}
        self._lock = Lock()

    def get(self, key: tuple, make: Callable[[], object]):
        """What is kept under `key`; made where nothing is, outside of the lock: making may look up other keys."""
        found = self.young.get(key)
        return self._renew(key, make) if found is None else found

    def _renew(self, key: tuple, make: Callable[[], object]):
        found = self.old.get(key)
        if found is None:
            found = make()
        with self._lock:
            if len(self.young) >= self.half:
                self.young, self.old = {}, self.young
            return self.young.setdefault(key, found)


_plans = Recent(MOST_PLANS)
planned = _plans.get  # the plan (or launcher's bundle of them) under a key


@contextmanager
def record_launches():
    """A list that collects (plan, arguments) of the block's launches, none of which runs: with tensors on `meta`, what
    would happen."""
    records: list[tuple[Plan, tuple]] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def _descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """TensorDescriptor(...) without its checks, which tma_ready has made: they cost as much as a launch."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = matrix, matrix.shape, matrix.stride()
    descriptor.block_shape = list(block)
    return descriptor
