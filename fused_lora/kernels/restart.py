"""The kernels of ReLoRA's restart, each a launch for many layers: weight += scale * B @ A, and A anew.

A launch finds its layers in a table of int64 in device memory, a row each: addresses, sizes, strides, seeds. A merge
reads factors with 16-byte accesses only: adjacent columns, aligned rows, filled up with zeros to multiples of 8. What
is not like that is copied before, by a third kernel.
"""

import itertools
import struct
from dataclasses import dataclass
from math import ceil

import torch
import triton
import triton.language as tl

from . import tiles
from .launch import Layout, Plan
from .primitives import accumulate, load_tile, store_tile
from .random import half_bits, hash_bits
from .rounding import join, round_randomly, split
from .tiles import Gpu

# The columns of a merge's table; the strides of a matrix are its row's and its column's.
SCALE, ROWS, COLS, COLS_FILLED, RANKS, SEED, FIRST = (tl.constexpr(i) for i in range(7))
WEIGHT, LOW, FACTOR_A, FACTOR_B = (tl.constexpr(i) for i in range(7, 19, 3))  # address, strides
FIELDS = tl.constexpr(19)
# And of a new beginning's.
NEW_RANKS, NEW_COLS, NEW_SEED, NEW_SPACING, NEW_FIRST, NEW_A = (tl.constexpr(i) for i in range(6))
NEW_FIELDS = tl.constexpr(8)
# And of a copy's.
OLD_ROWS, OLD_COLS, COPY_ROWS, COPY_COLS, COPY, COPY_FIRST, ORIGINAL = (tl.constexpr(i) for i in range(7))
COPY_FIELDS = tl.constexpr(9)
FACTOR_BLOCK = (16, 256)


@triton.jit
def merge_and_reinit_kernel(
    table, layer_of,
    WEIGHT_TYPE: tl.constexpr, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_LOW: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The merge: one program per SPAN tiles along a weight's rows. Entries to which nothing is added keep their bits.

    UNIT: a weight's columns are adjacent; ALIGNED: and its rows begin at 16 bytes and may be written up to a multiple
    of 8 columns; WHOLE: r fits a block, so that B is read once.
    """
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
    N, R = tl.load(entry + ROWS).to(tl.int32), tl.multiple_of(tl.load(entry + RANKS).to(tl.int32), 8)
    K = tl.multiple_of(tl.load(entry + COLS_FILLED).to(tl.int32), 8)
    A, stride_A, step_A = _matrix(entry + FACTOR_A, FACTOR_TYPE, True, True)
    B, stride_B, step_B = _matrix(entry + FACTOR_B, FACTOR_TYPE, True, True)
    weight, stride_weight, step_weight = _matrix(entry + WEIGHT, WEIGHT_TYPE, UNIT, ALIGNED)
    if HAS_LOW:
        low, stride_low, step_low = _matrix(entry + LOW, tl.int16, UNIT, ALIGNED)
    if ALIGNED:
        cols = K
    else:
        cols = tl.load(entry + COLS).to(tl.int32)
    strip = tl.program_id(0) - tl.load(entry + FIRST).to(tl.int32)
    strips = tl.cdiv(K, SPAN * BLOCK_K)
    row, first = strip // strips * BLOCK_N, strip % strips * (SPAN * BLOCK_K)
    if WHOLE:
        b = load_tile(B, row, 0, N, R, stride_B, step_B, BLOCK_N, BLOCK_R, False)
    # These roundings give back every bfloat16, whatever its bits, that they are given.
    BITWISE: tl.constexpr = tl.bfloat16 == WEIGHT_TYPE and (HAS_LOW or STOCHASTIC)
    for col in tl.range(first, min(first + SPAN * BLOCK_K, K), BLOCK_K):
        if WHOLE:
            a = load_tile(A, 0, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)
        old = load_tile(weight, row, col, N, cols, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)
        if HAS_LOW:
            old_low = load_tile(low, row, col, N, cols, stride_low, step_low, BLOCK_N, BLOCK_K, False).to(tl.int16)
        if WHOLE:
            delta = tl.dot(b, a, input_precision=PRECISION)
        else:
            delta = accumulate(
                tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), B, A, row, col, N, K, R, 0, R,
                stride_B, step_B, stride_A, step_A, 0, 0,
                BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
            )  # fmt: skip
        delta *= scale
        whole = join(old, old_low) if HAS_LOW else old.to(tl.float32)
        added = tl.where(delta == 0, whole, whole + delta)  # not the same for -0 and NaN
        if HAS_LOW:
            new, new_low = split(added, WEIGHT_TYPE)
            if not BITWISE:
                new_low = tl.where(delta == 0, old_low, new_low)
            store_tile(low, new_low, row, col, N, cols, stride_low, step_low, BLOCK_N, BLOCK_K, False)
        elif STOCHASTIC:
            random = half_bits(tl.load(entry + SEED) + 1, row, col, BLOCK_N, BLOCK_K)
            new = round_randomly(added, random, WEIGHT_TYPE)
        else:
            new = added.to(WEIGHT_TYPE)
        if not BITWISE:
            new = tl.where(delta == 0, old, new)
        store_tile(weight, new, row, col, N, cols, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)


@triton.jit
def _matrix(fields, TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """A matrix of the table: its pointer and its strides, with what the compiler may rely on."""
    pointer = tl.load(fields).to(tl.pointer_type(TYPE))
    stride = tl.load(fields + 1)
    if ALIGNED:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 8)
    if UNIT:
        return pointer, stride, 1
    else:
        return pointer, stride, tl.load(fields + 2)


@triton.jit
def reinit_kernel(
    table, layer_of, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A uniform in (-1, 1) / sqrt(K): one program per tile of an A. ALIGNED: and K is a multiple of 8."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * NEW_FIELDS
    R, K = tl.load(entry + NEW_RANKS).to(tl.int32), tl.load(entry + NEW_COLS).to(tl.int32)
    if ALIGNED:
        K = tl.multiple_of(K, 8)
    A, stride_A, step_A = _matrix(entry + NEW_A, FACTOR_TYPE, UNIT, ALIGNED)
    tile = tl.program_id(0) - tl.load(entry + NEW_FIRST).to(tl.int32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, col = tile // blocks_k * BLOCK_R, tile % blocks_k * BLOCK_K
    odd = 2 * (hash_bits(tl.load(entry + NEW_SEED), row, col, BLOCK_R, BLOCK_K) >> 8).to(tl.int32) + 1 - 16777216
    spacing = tl.load(entry + NEW_SPACING).to(tl.int32).to(tl.float32, bitcast=True)
    store_tile(A, odd.to(tl.float32) * spacing, row, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)


@triton.jit
def fill_up_kernel(
    table, layer_of, OLD_TYPE: tl.constexpr, COPY_TYPE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A factor's copy, in another dtype and with zeros beyond its last row and column: one program per tile of it."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * COPY_FIELDS
    old, stride_old, step_old = _matrix(entry + ORIGINAL, OLD_TYPE, UNIT, False)
    new = tl.multiple_of(tl.load(entry + COPY).to(tl.pointer_type(COPY_TYPE)), 16)
    rows, cols = tl.load(entry + COPY_ROWS).to(tl.int32), tl.multiple_of(tl.load(entry + COPY_COLS).to(tl.int32), 8)
    old_rows, old_cols = tl.load(entry + OLD_ROWS).to(tl.int32), tl.load(entry + OLD_COLS).to(tl.int32)
    tile = tl.program_id(0) - tl.load(entry + COPY_FIRST).to(tl.int32)
    blocks = tl.cdiv(cols, BLOCK_COLS)
    row, col = tile // blocks * BLOCK_ROWS, tile % blocks * BLOCK_COLS
    values = load_tile(old, row, col, old_rows, old_cols, stride_old, step_old, BLOCK_ROWS, BLOCK_COLS, False)
    store_tile(new, values, row, col, rows, cols, cols, 1, BLOCK_ROWS, BLOCK_COLS, False)


@dataclass(frozen=True)
class Update:
    """What a merge of one layer, or of some rows of one, reads and writes: A (r, K) and B (N, r) filled up, low on
    weight's device."""

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scale: torch.Tensor
    seed: int
    low: torch.Tensor | None

    def kind(self) -> tuple:
        """What a launch's layers have in common: (dtypes, whether there is a low half, UNIT, ALIGNED, rank block)."""
        written = [matrix for matrix in (self.weight, self.low) if matrix is not None]
        unit, aligned = all(matrix.stride(1) == 1 for matrix in written), all(map(is_open, written))
        return self.weight.dtype, self.A.dtype, self.low is not None, unit, aligned, tiles.rank_block(len(self.A), 256)

    def row(self, first: int) -> list[int]:
        (N, K), (r, filled) = self.weight.shape, self.A.shape
        matrices = (self.weight, self.weight if self.low is None else self.low, self.A, self.B)
        fields = [field for matrix in matrices for field in (matrix.data_ptr(), *matrix.stride())]
        return [self.scale.data_ptr(), N, K, filled, r, self.seed, first, *fields]


def filled(size: int) -> int:
    """Up to a multiple of 8, which 16-byte accesses need."""
    return ceil(size / 8) * 8


def is_open(matrix: torch.Tensor) -> bool:
    """To 16-byte accesses along its rows: columns adjacent, rows aligned, of a multiple of 8 or filled up to one."""
    layout = Layout.of(matrix)
    end = matrix.storage_offset() + (layout.rows - 1) * layout.stride_row + filled(layout.cols)
    own = layout.cols % 8 == 0 or layout.stride_row == filled(layout.cols)
    inside = end * matrix.element_size() <= matrix.untyped_storage().nbytes()
    return layout.stride_col == 1 and layout.stride_row % 8 == 0 and layout.aligned and own and inside


def merge_plan(updates: list[Update], stochastic: bool, gpu: Gpu):
    """(plan, its table, the row of each program) of merges of one kind."""
    weight_dtype, factor_dtype, has_low, unit, aligned, rank_block = updates[0].kind()
    stochastic = stochastic and weight_dtype.itemsize == 2
    itemsize = max(factor_dtype.itemsize, weight_dtype.itemsize)
    tile, span = tiles.restart_tile(rank_block, gpu, itemsize, aligned, has_low, stochastic)
    counts = [_tiles(update.weight, tile.block_m, tile.block_n * span) for update in updates]
    meta = dict(
        WEIGHT_TYPE=_triton(weight_dtype), FACTOR_TYPE=_triton(factor_dtype), UNIT=unit, ALIGNED=aligned,
        HAS_LOW=has_low, STOCHASTIC=stochastic, WHOLE=rank_block == tile.block_k,
        BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=tile.block_k, SPAN=span,
        PRECISION="tf32x3" if weight_dtype.itemsize == 2 else "ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return _tabled(merge_and_reinit_kernel, meta, updates, counts, updates[0].weight.device)


@dataclass(frozen=True)
class Beginning:
    """A factor A (r, K) and the seed of its new entries."""

    A: torch.Tensor
    seed: int

    def kind(self) -> tuple:
        return self.A.dtype, self.A.stride(1) == 1, is_open(self.A) and self.A.shape[1] % 8 == 0

    def row(self, first: int) -> list[int]:
        r, K = self.A.shape
        spacing = struct.unpack("<i", struct.pack("<f", K**-0.5 / 2**24))[0]
        return [r, K, self.seed, spacing, first, self.A.data_ptr(), *self.A.stride()]


def reinit_plan(beginnings: list[Beginning]):
    """(plan, its table, the row of each program) of new beginnings of one kind."""
    dtype, unit, aligned = beginnings[0].kind()
    counts = [_tiles(beginning.A, *FACTOR_BLOCK) for beginning in beginnings]
    meta = dict(
        FACTOR_TYPE=_triton(dtype), UNIT=unit, ALIGNED=aligned, BLOCK_R=FACTOR_BLOCK[0], BLOCK_K=FACTOR_BLOCK[1],
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return _tabled(reinit_kernel, meta, beginnings, counts, beginnings[0].A.device)


@dataclass(frozen=True)
class Filling:
    """A factor and its copy, which is contiguous and at least as large in both directions."""

    factor: torch.Tensor
    copy: torch.Tensor

    def kind(self) -> tuple:
        return self.factor.dtype, self.copy.dtype, self.factor.stride(1) == 1

    def row(self, first: int) -> list[int]:
        factor, copy = self.factor, self.copy
        return [*factor.shape, *copy.shape, copy.data_ptr(), first, factor.data_ptr(), *factor.stride()]


def fill_up_plan(fillings: list[Filling]):
    """(plan, its table, the row of each program) of copies of one kind."""
    old_dtype, dtype, unit = fillings[0].kind()
    counts = [_tiles(filling.copy, *FACTOR_BLOCK) for filling in fillings]
    meta = dict(
        OLD_TYPE=_triton(old_dtype), COPY_TYPE=_triton(dtype), UNIT=unit,
        BLOCK_ROWS=FACTOR_BLOCK[0], BLOCK_COLS=FACTOR_BLOCK[1], num_warps=8, num_stages=1,
    )  # fmt: skip
    return _tabled(fill_up_kernel, meta, fillings, counts, fillings[0].copy.device)


def by_kind(entries: list) -> list[list]:
    """What can share a launch together, in order."""
    groups: dict[tuple, list] = {}
    for entry in entries:
        groups.setdefault(entry.kind(), []).append(entry)
    return list(groups.values())


def _tiles(matrix: torch.Tensor, block_rows: int, block_cols: int) -> int:
    return ceil(matrix.shape[0] / block_rows) * ceil(matrix.shape[1] / block_cols)


def _tabled(kernel, meta: dict, entries: list, counts: list[int], device):
    starts = [0, *itertools.accumulate(counts)]
    rows = [entry.row(start) for entry, start in zip(entries, starts, strict=False)]
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    tables = (torch.tensor(rows, dtype=torch.int64), owners)
    if device.type == "cuda":  # from pinned memory, so that the host goes on
        tables = (table.pin_memory() for table in tables)
    return Plan(kernel, (sum(counts), 1, 1), meta), *(table.to(device, non_blocking=True) for table in tables)


def _triton(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))
