"""ReLoRA's restart of many layers in two launches for each combination of dtypes: weight += scale * B @ A, then A anew.

A launch finds its layers in a table of int64 in device memory: addresses, sizes, strides, seeds.
"""

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

# The columns of the table; the strides of a matrix are its row's and its column's.
WEIGHT, FACTOR_A, FACTOR_B, LOW, SCALE = (tl.constexpr(i) for i in range(5))
ROWS, COLS, RANKS, SEED, SPACING, FIRST, FIRST_OF_A = (tl.constexpr(i) for i in range(5, 12))
STRIDE_WEIGHT, STRIDE_A, STRIDE_B, STRIDE_LOW = (tl.constexpr(i) for i in range(12, 20, 2))
FIELDS = tl.constexpr(20)
A_BLOCK = (32, 256)


@triton.jit
def merge_and_reinit_kernel(
    table, layer_of,
    WEIGHT_TYPE: tl.constexpr, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_LOW: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The merge: one program per SPAN tiles along a weight's rows. Entries to which nothing is added keep their bits.

    UNIT: columns are adjacent; ALIGNED: and rows begin at 16 bytes; WHOLE: r fits a block, so that B is read once.
    """
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
    N, K = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLS).to(tl.int32)
    R = tl.load(entry + RANKS).to(tl.int32)
    if ALIGNED:
        K, R = tl.multiple_of(K, 8), tl.multiple_of(R, 8)
    weight, stride_weight, step_weight = _matrix(entry, WEIGHT, STRIDE_WEIGHT, WEIGHT_TYPE, UNIT, ALIGNED)
    A, stride_A, step_A = _matrix(entry, FACTOR_A, STRIDE_A, FACTOR_TYPE, UNIT, ALIGNED)
    B, stride_B, step_B = _matrix(entry, FACTOR_B, STRIDE_B, FACTOR_TYPE, UNIT, ALIGNED)
    if HAS_LOW:
        low, stride_low, step_low = _matrix(entry, LOW, STRIDE_LOW, tl.int16, UNIT, ALIGNED)
    strip = tl.program_id(0) - tl.load(entry + FIRST).to(tl.int32)
    strips = tl.cdiv(K, SPAN * BLOCK_K)
    row, first = strip // strips * BLOCK_N, strip % strips * (SPAN * BLOCK_K)
    if WHOLE:
        b = load_tile(B, row, 0, N, R, stride_B, step_B, BLOCK_N, BLOCK_R, False)
    for col in tl.range(first, min(first + SPAN * BLOCK_K, K), BLOCK_K):
        if WHOLE:
            a = load_tile(A, 0, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)
        old = load_tile(weight, row, col, N, K, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)
        if HAS_LOW:
            old_low = load_tile(low, row, col, N, K, stride_low, step_low, BLOCK_N, BLOCK_K, False).to(tl.int16)
        if WHOLE:
            delta = tl.dot(b, a, input_precision=PRECISION)
        else:
            delta = accumulate(
                tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), B, A, row, col, N, K, R, 0, R,
                stride_B, step_B, stride_A, step_A, 0, 0,
                BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
            )  # fmt: skip
        delta *= scale
        if HAS_LOW:
            new, new_low = split(join(old, old_low) + delta, WEIGHT_TYPE)
            new_low = tl.where(delta == 0, old_low, new_low)
            store_tile(low, new_low, row, col, N, K, stride_low, step_low, BLOCK_N, BLOCK_K, False)
        elif STOCHASTIC:
            random = half_bits(tl.load(entry + SEED) + 1, row, col, BLOCK_N, BLOCK_K)
            new = round_randomly(old.to(tl.float32) + delta, random, WEIGHT_TYPE)
        else:
            new = (old.to(tl.float32) + delta).to(WEIGHT_TYPE)
        new = tl.where(delta == 0, old, new)
        store_tile(weight, new, row, col, N, K, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)


@triton.jit
def _matrix(
    entry, ADDRESS: tl.constexpr, STRIDE: tl.constexpr, TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr
):
    """A matrix of the table: its pointer and its strides, with what the compiler may rely on."""
    pointer = tl.load(entry + ADDRESS).to(tl.pointer_type(TYPE))
    stride = tl.load(entry + STRIDE)
    if ALIGNED:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 8)
    if UNIT:
        return pointer, stride, 1
    else:
        return pointer, stride, tl.load(entry + STRIDE + 1)


@triton.jit
def reinit_kernel(
    table, layer_of, FACTOR_TYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A uniform in (-1, 1) / sqrt(K): one program per tile of an A."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    K, R = tl.load(entry + COLS).to(tl.int32), tl.load(entry + RANKS).to(tl.int32)
    if ALIGNED:
        K = tl.multiple_of(K, 8)
    A, stride_A, step_A = _matrix(entry, FACTOR_A, STRIDE_A, FACTOR_TYPE, UNIT, ALIGNED)
    tile = tl.program_id(0) - tl.load(entry + FIRST_OF_A).to(tl.int32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, col = tile // blocks_k * BLOCK_R, tile % blocks_k * BLOCK_K
    odd = 2 * (hash_bits(tl.load(entry + SEED), row, col, BLOCK_R, BLOCK_K) >> 8).to(tl.int32) + 1 - 16777216
    spacing = tl.load(entry + SPACING).to(tl.int32).to(tl.float32, bitcast=True)
    store_tile(A, odd.to(tl.float32) * spacing, row, col, R, K, stride_A, step_A, BLOCK_R, BLOCK_K, False)


@dataclass(frozen=True)
class Layer:
    """What a restart of one layer reads and writes; A and B have one dtype, the weight's or float32."""

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scale: torch.Tensor
    seed: int
    low: torch.Tensor | None

    def kind(self) -> tuple:
        """What a launch's layers have in common: (dtypes, whether there is a low half, UNIT, ALIGNED, rank block)."""
        layouts = [Layout.of(m) for m in (self.weight, self.A, self.B, self.low) if m is not None]
        unit = all(layout.stride_col == 1 for layout in layouts)
        aligned = unit and all(layout.stride_row % 8 == 0 and layout.aligned for layout in layouts)
        aligned = aligned and self.A.shape[0] % 8 == self.A.shape[1] % 8 == 0
        return self.weight.dtype, self.A.dtype, self.low is not None, unit, aligned, tiles.rank_block(len(self.A), 256)

    def fields(self, first: int, first_of_A: int) -> list[int]:
        """Its row of the table."""
        (N, K), r = self.weight.shape, self.A.shape[0]
        low = self.weight if self.low is None else self.low
        matrices = (self.weight, self.A, self.B, low)
        addresses = [tensor.data_ptr() for tensor in (*matrices, self.scale)]
        spacing = struct.unpack("<i", struct.pack("<f", K**-0.5 / 2**24))[0]
        strides = [stride for matrix in matrices for stride in matrix.stride()]
        return [*addresses, N, K, r, self.seed, spacing, first, first_of_A, *strides]


def merge_and_reinit_(layers: list[Layer], stochastic: bool, gpu: Gpu) -> None:
    """Restarts every layer: all tables and kernels first, so that whatever is missing is missed before a change."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind(), []).append(layer)
    launches = [launch for kind, group in groups.items() for launch in _launches(kind, group, stochastic, gpu)]
    for plan, *tables in launches:
        plan.load((), tuple(tables))
    for plan, *tables in launches:
        plan.run((), tuple(tables))
    torch._foreach_zero_([layer.B for layer in layers])


def _launches(kind: tuple, layers: list[Layer], stochastic: bool, gpu: Gpu):
    """(plan, table, layer of each program) of the merge and of the factors' new beginning."""
    weight_dtype, factor_dtype, has_low, unit, aligned, rank_block = kind
    stochastic = stochastic and weight_dtype.itemsize == 2
    itemsize = max(factor_dtype.itemsize, weight_dtype.itemsize)
    tile, span = tiles.restart_tile(rank_block, gpu, itemsize, aligned, not has_low and not stochastic)
    counts = [_tiles(layer.weight, tile.block_m, tile.block_n * span) for layer in layers]
    counts_of_A = [_tiles(layer.A, *A_BLOCK) for layer in layers]
    rows = [layer.fields(sum(counts[:i]), sum(counts_of_A[:i])) for i, layer in enumerate(layers)]
    device = layers[0].weight.device
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    both = dict(FACTOR_TYPE=_triton(factor_dtype), UNIT=unit, ALIGNED=aligned)
    merge = dict(
        both, WEIGHT_TYPE=_triton(weight_dtype), HAS_LOW=has_low, STOCHASTIC=stochastic,
        WHOLE=rank_block == tile.block_k, BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=tile.block_k,
        SPAN=span, PRECISION="tf32x3" if weight_dtype.itemsize == 2 else "ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    yield Plan(merge_and_reinit_kernel, (sum(counts), 1, 1), merge), table, _owners(counts, device)
    reinit = dict(both, BLOCK_R=A_BLOCK[0], BLOCK_K=A_BLOCK[1], num_warps=8, num_stages=1)
    yield Plan(reinit_kernel, (sum(counts_of_A), 1, 1), reinit), table, _owners(counts_of_A, device)


def _tiles(matrix: torch.Tensor, block_rows: int, block_cols: int) -> int:
    return ceil(matrix.shape[0] / block_rows) * ceil(matrix.shape[1] / block_cols)


def _owners(counts: list[int], device) -> torch.Tensor:
    """Which layer each program works on."""
    owners = torch.arange(len(counts), dtype=torch.int32)
    return owners.repeat_interleave(torch.tensor(counts)).to(device)


def _triton(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))
