"""The tables and launches of the restart's kernels: what a row of each says, and which rows can share a launch."""

import itertools
import struct
from dataclasses import dataclass
from math import ceil

import torch
import triton.language as tl

from ..padding import padded
from . import tiles
from .launch import Layout, Plan, planned
from .restart import fill_up_kernel, reinit_kernel, restart_kernel
from .tiles import Gpu

FACTOR_BLOCK = (16, 256)


@dataclass
class Launch:
    """A plan and its two tables, in the host's memory until upload() has put all of them on the device."""

    plan: Plan
    table: torch.Tensor
    owners: torch.Tensor  # the row of each program

    def load(self) -> None:
        self.plan.load((), (self.table, self.owners))

    def run(self) -> None:
        self.plan.over((len(self.owners), 1, 1)).run((), (self.table, self.owners))


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
        return merge_kind(self.weight, self.low, self.A.dtype, len(self.A))

    def row(self, first: int) -> list[int]:
        (N, K), (r, A_cols) = self.weight.shape, self.A.shape
        matrices = (self.weight, self.weight if self.low is None else self.low, self.A, self.B)
        fields = [field for matrix in matrices for field in (matrix.data_ptr(), *matrix.stride())]
        return [self.scale.data_ptr(), N, K, A_cols, r, self.seed, first, *fields]


def merge_kind(weight: torch.Tensor, low: torch.Tensor | None, factor_dtype: torch.dtype, r: int) -> tuple:
    """What a launch's layers have in common, of a merge that reads factors of this dtype and rank."""
    written = [matrix for matrix in (weight, low) if matrix is not None]
    unit, aligned = all(matrix.stride(1) == 1 for matrix in written), all(map(is_open, written))
    filled_up = aligned and weight.shape[1] % 8 != 0
    return weight.dtype, factor_dtype, low is not None, unit, aligned, filled_up, tiles.rank_block(r, 256)


def filled(size: int, unit: int = 8) -> int:
    """Up to a multiple of a unit: of 8 entries, which 16-byte accesses need."""
    return ceil(size / unit) * unit


def is_open(matrix: torch.Tensor) -> bool:
    """To 16-byte accesses along its rows: columns adjacent, rows aligned, of a multiple of 8 or filled up to one."""
    layout = Layout.of(matrix)
    end = matrix.storage_offset() + (layout.rows - 1) * layout.stride_row + filled(layout.cols)
    own = layout.cols % 8 == 0 or layout.stride_row in (filled(layout.cols), padded(layout.cols))
    inside = end * matrix.element_size() <= matrix.untyped_storage().nbytes()
    return layout.stride_col == 1 and layout.stride_row % 8 == 0 and layout.aligned and own and inside


def merge_launch(updates: list[Update], stochastic: bool, gpu: Gpu) -> Launch:
    """Of merges of one kind."""
    weight_dtype, factor_dtype, has_low, unit, aligned, filled_up, rank_block = updates[0].kind()
    stochastic = stochastic and weight_dtype.itemsize == 2
    itemsize = max(factor_dtype.itemsize, weight_dtype.itemsize)
    tile, span = tiles.restart_tile(rank_block, gpu, itemsize, aligned, has_low, stochastic)
    counts = [_tiles(update.weight, tile.block_m, tile.block_n * span) for update in updates]
    meta = dict(
        WEIGHT_TYPE=_triton(weight_dtype), FACTOR_TYPE=_triton(factor_dtype), UNIT=unit, ALIGNED=aligned,
        FILLED=filled_up, HAS_LOW=has_low, STOCHASTIC=stochastic, WHOLE=rank_block == tile.block_k,
        BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=tile.block_k, SPAN=span,
        PRECISION="tf32x3" if weight_dtype.itemsize == 2 else "ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return _launch(restart_kernel, meta, updates, counts, updates[0].weight.device)


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


def reinit_launch(beginnings: list[Beginning]) -> Launch:
    """Of new beginnings of one kind."""
    dtype, unit, aligned = beginnings[0].kind()
    counts = [_tiles(beginning.A, *FACTOR_BLOCK) for beginning in beginnings]
    meta = dict(
        FACTOR_TYPE=_triton(dtype), UNIT=unit, ALIGNED=aligned, BLOCK_R=FACTOR_BLOCK[0], BLOCK_K=FACTOR_BLOCK[1],
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return _launch(reinit_kernel, meta, beginnings, counts, beginnings[0].A.device)


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


def fill_up_launch(fillings: list[Filling]) -> Launch:
    """Of copies of one kind."""
    old_dtype, dtype, unit = fillings[0].kind()
    counts = [_tiles(filling.copy, *FACTOR_BLOCK) for filling in fillings]
    meta = dict(
        OLD_TYPE=_triton(old_dtype), COPY_TYPE=_triton(dtype), UNIT=unit,
        BLOCK_ROWS=FACTOR_BLOCK[0], BLOCK_COLS=FACTOR_BLOCK[1], num_warps=8, num_stages=1,
    )  # fmt: skip
    return _launch(fill_up_kernel, meta, fillings, counts, fillings[0].copy.device)


def by_kind(entries: list) -> list[list]:
    """What can share a launch together, in order."""
    groups: dict[tuple, list] = {}
    for entry in entries:
        groups.setdefault(entry.kind(), []).append(entry)
    return list(groups.values())


def _tiles(matrix: torch.Tensor, block_rows: int, block_cols: int) -> int:
    return ceil(matrix.shape[0] / block_rows) * ceil(matrix.shape[1] / block_cols)


def _launch(kernel, meta: dict, entries: list, counts: list[int], device: torch.device) -> Launch:
    starts = [0, *itertools.accumulate(counts)]
    rows = [entry.row(start) for entry, start in zip(entries, starts, strict=False)]
    owners = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    # Launches of a kind share what is compiled.
    plan = planned((kernel.fn.__name__, device, *meta.items()), lambda: Plan(kernel, (1, 1, 1), meta))
    return Launch(plan, torch.tensor(rows, dtype=torch.int64), owners)


def table_bytes(launches: list[Launch]) -> int:
    return sum(_table_sizes(launches))


def upload(launches: list[Launch], space: torch.Tensor) -> None:
    """All tables in one copy to `space`, of table_bytes or more, on the device."""
    tables, sizes = _tables(launches), _table_sizes(launches)
    packed = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=space.is_cuda)
    for part, table in zip(packed.split(sizes), tables, strict=True):
        part[: table.nbytes] = table.flatten().view(torch.uint8)
    space = space[: len(packed)].copy_(packed, non_blocking=True)
    parts = iter(space.split(sizes))
    for launch in launches:
        table, owners = (next(parts)[: host.nbytes].view(host.dtype) for host in (launch.table, launch.owners))
        launch.table, launch.owners = table, owners


def _tables(launches: list[Launch]) -> list[torch.Tensor]:
    return [table for launch in launches for table in (launch.table, launch.owners)]


def _table_sizes(launches: list[Launch]) -> list[int]:
    """In bytes, aligned alike, or each would be compiled for itself."""
    return [filled(table.nbytes, 16) for table in _tables(launches)]


def _triton(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))
