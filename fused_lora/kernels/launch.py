"""How kernels are launched: plans made once per layout of the operands, TMA descriptors, and launches recorded dry.

A first launch goes through Triton's JIT. Later ones of the same plan go straight to the compiled kernel: all that the
JIT would look at again (types, alignment, divisibility, constants) is in the plan's key. They make the call that the
JIT makes itself in the end, so that nothing here depends on how a version of Triton packs arguments.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..recent import Recent
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
        self.compiled = None

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
        if _records.get() is None and self.compiled is None:
            compiled = self.kernel.warmup(*self.arguments(matrices, rest), grid=self.grid, **self.meta)
            if compiled is not None:  # as it is under the interpreter
                compiled._init_handles()
                self.compiled = compiled

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
        elif self.compiled is None:
            self.compiled = self.kernel[self.grid](*args, **self.meta)
        else:
            start(self.compiled, self.grid, (*args, *self._constants))

    def call(self, stream: int, args: tuple) -> tuple[Callable, tuple]:
        """What a run on a stream ends in, to be called any number of times: a C function of Triton's and its arguments.
        Tensors among args are pointers."""
        args = (*args, *self._constants)
        return _end_of(self.compiled, self.grid, stream, args) or (start, (self.compiled, self.grid, args))


def _end_of(compiled, grid: tuple[int, int, int], stream: int, args: tuple) -> tuple[Callable, tuple] | None:
    """None where this version of Triton launches in another way than is known here, which takes longer."""
    try:
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        launcher, ends = copy.copy(compiled.run), []
        if launcher.global_scratch_size or launcher.profile_scratch_size:  # allocated for each launch
            return None
        function = launcher.launch
        if inspect.isbuiltin(function):
            launcher.launch = lambda *end: ends.append(end)
        else:
            meta = getattr(compiled.metadata, "tensordesc_meta", None)
            launcher.launch = wrap_handle_tensordesc(lambda *end: ends.append(end), compiled.src.signature, meta)
            function = inspect.getclosurevars(function).nonlocals["launcher"]
        launcher(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    except (ImportError, AttributeError, KeyError, TypeError):
        return None
    return (function, ends[0]) if inspect.isbuiltin(function) and len(ends) == 1 else None


def start(compiled, grid: tuple[int, int, int], args: tuple) -> None:
    """compiled[grid](*args), which prepares every launch for hooks; where none is set (a profiler sets them), without.

    36 arguments on a CPU at hand, without Triton's C: 12 us, and 3 so.
    """
    if _has_hooks():
        compiled[grid](*args)
        return
    run = compiled.run  # loads the kernel, which then has a function
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def observed() -> bool:
    """Whether somebody wants to see each launch."""
    return _records.get() is not None or _has_hooks()


def _has_hooks() -> bool:
    return _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook)


def _is_set(hook) -> bool:
    """A chain of hooks may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


# 1.6 KB each: a model of ten layer shapes has 60 for each count of tokens.
MOST_PLANS = 8192


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


def with_base(like: TensorDescriptor, base) -> TensorDescriptor:
    """A descriptor of another matrix of the same layout."""
    descriptor = copy.copy(like)
    descriptor.base = base
    return descriptor


def without_base(descriptor: TensorDescriptor) -> TensorDescriptor:
    """What can be kept of a descriptor without keeping its matrix."""
    return with_base(descriptor, None)
