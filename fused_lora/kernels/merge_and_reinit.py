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
from .random import hash_bits
from .rounding import join, round_randomly, split
from .tiles import Gpu

# The columns of the table; the strides of a matrix are its row's and its column's.
WEIGHT, FACTOR_A, FACTOR_B, LOW, SCALE = (tl.constexpr(i) for i in range(5))
ROWS, COLS, RANKS, SEED, UNIT, FIRST, FIRST_OF_A = (tl.constexpr(i) for i in range(5, 12))
STRIDE_WEIGHT, STRIDE_A, STRIDE_B, STRIDE_LOW = (tl.constexpr(i) for i in range(12, 20, 2))
FIELDS = tl.constexpr(20)
A_BLOCK = (32, 256)


@triton.jit
def merge_and_reinit_kernel(
    table, layer_of,
    WEIGHT_TYPE: tl.constexpr, FACTOR_TYPE: tl.constexpr, DENSE: tl.constexpr, HAS_LOW: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The merge: one program per tile of a weight. Entries to which nothing is added keep their bits."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    weight = tl.load(entry + WEIGHT).to(tl.pointer_type(WEIGHT_TYPE))
    A = tl.load(entry + FACTOR_A).to(tl.pointer_type(FACTOR_TYPE))
    B = tl.load(entry + FACTOR_B).to(tl.pointer_type(FACTOR_TYPE))
    scale = tl.load(tl.load(entry + SCALE).to(tl.pointer_type(tl.float32)))
    N, K = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLS).to(tl.int32)
    R = tl.load(entry + RANKS).to(tl.int32)
    tile = tl.program_id(0) - tl.load(entry + FIRST).to(tl.int32)
    stride_weight = tl.load(entry + STRIDE_WEIGHT)
    stride_A, stride_B = tl.load(entry + STRIDE_A), tl.load(entry + STRIDE_B)
    if DENSE:
        weight, A, B = tl.multiple_of(weight, 16), tl.multiple_of(A, 16), tl.multiple_of(B, 16)
        stride_weight, stride_A, stride_B = (
            tl.multiple_of(stride_weight, 8), tl.multiple_of(stride_A, 8), tl.multiple_of(stride_B, 8),
        )  # fmt: skip
        K, R = tl.multiple_of(K, 8), tl.multiple_of(R, 8)
        step_weight, step_A, step_B = 1, 1, 1
    else:
        step_weight = tl.load(entry + STRIDE_WEIGHT + 1)
        step_A, step_B = tl.load(entry + STRIDE_A + 1), tl.load(entry + STRIDE_B + 1)
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, col = tile // blocks_k * BLOCK_N, tile % blocks_k * BLOCK_K
    old = load_tile(weight, row, col, N, K, stride_weight, step_weight, BLOCK_N, BLOCK_K, False)
    delta = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    delta = accumulate(
        delta, B, A, row, col, N, K, R, 0, R, stride_B, step_B, stride_A, step_A, 0, 0,
        BLOCK_N, BLOCK_K, BLOCK_R, False, False, False, False, PRECISION,
    )  # fmt: skip
    delta *= scale
    if HAS_LOW:
        low = tl.load(entry + LOW).to(tl.pointer_type(tl.int16))
        stride_low = tl.load(entry + STRIDE_LOW)
        if DENSE:
            low, stride_low, step_low = tl.multiple_of(low, 16), tl.multiple_of(stride_low, 8), 1
        else:
            step_low = tl.load(entry + STRIDE_LOW + 1)
        old_low = load_tile(low, row, col, N, K, stride_low, step_low, BLOCK_N, BLOCK_K, False).to(tl.int16)
        new, new_low = split(join(old, old_low) + delta, WEIGHT_TYPE)
        store_tile(
            low, tl.where(delta == 0, old_low, new_low), row, col, N, K, stride_low, step_low, BLOCK_N, BLOCK_K, False
        )
    elif STOCHASTIC:
        random = hash_bits(tl.load(entry + SEED) + 1, row, col, BLOCK_N, BLOCK_K)
        new = round_randomly(old.to(tl.float32) + delta, random, WEIGHT_TYPE)
    else:
        new = (old.to(tl.float32) + delta).to(WEIGHT_TYPE)
    store_tile(
        weight, tl.where(delta == 0, old, new), row, col, N, K, stride_weight, step_weight, BLOCK_N, BLOCK_K, False
    )


@triton.jit
def reinit_kernel(table, layer_of, FACTOR_TYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """A uniform in (-1, 1) / sqrt(K): one program per tile of an A."""
    entry = table + tl.load(layer_of + tl.program_id(0)) * FIELDS
    A = tl.load(entry + FACTOR_A).to(tl.pointer_type(FACTOR_TYPE))
    K, R = tl.load(entry + COLS).to(tl.int32), tl.load(entry + RANKS).to(tl.int32)
    tile = tl.program_id(0) - tl.load(entry + FIRST_OF_A).to(tl.int32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    row, col = tile // blocks_k * BLOCK_R, tile % blocks_k * BLOCK_K
    odd = 2 * (hash_bits(tl.load(entry + SEED), row, col, BLOCK_R, BLOCK_K) >> 8).to(tl.int32) + 1 - 16777216
    unit = tl.load(entry + UNIT).to(tl.int32).to(tl.float32, bitcast=True)
    store_tile(
        A, odd.to(tl.float32) * unit, row, col, R, K, tl.load(entry + STRIDE_A), tl.load(entry + STRIDE_A + 1),
        BLOCK_R, BLOCK_K, False,
    )  # fmt: skip


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
        """What a launch's layers have in common."""
        matrices = [m for m in (self.weight, self.A, self.B, self.low) if m is not None]
        dense = all(_is_dense(Layout.of(m)) for m in matrices) and self.A.shape[0] % 8 == self.A.shape[1] % 8 == 0
        return self.weight.dtype, self.A.dtype, self.low is not None, dense, tiles.rank_block(self.A.shape[0], 32)

    def fields(self, first: int, first_of_A: int) -> list[int]:
        """Its row of the table."""
        (N, K), r = self.weight.shape, self.A.shape[0]
        low = self.weight if self.low is None else self.low
        matrices = (self.weight, self.A, self.B, low)
        addresses = [tensor.data_ptr() for tensor in (*matrices, self.scale)]
        bound = struct.unpack("<i", struct.pack("<f", K**-0.5 / 2**24))[0]
        strides = [stride for matrix in matrices for stride in matrix.stride()]
        return [*addresses, N, K, r, self.seed, bound, first, first_of_A, *strides]


def _is_dense(layout: Layout) -> bool:
    """16-byte accesses along rows; under the interpreter and on a GPU alike."""
    return layout.stride_col == 1 and layout.stride_row % 8 == 0 and layout.aligned


def merge_and_reinit_(layers: list[Layer], stochastic: bool, gpu: Gpu) -> None:
    """Restarts every layer: all tables first, so that running out of memory comes before the first change."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind(), []).append(layer)
    launches = [launch for kind, group in groups.items() for launch in _launches(kind, group, stochastic, gpu)]
    for plan, table, layer_of in launches:
        plan.run((), (table, layer_of))
    torch._foreach_zero_([layer.B for layer in layers])


def _launches(kind: tuple, layers: list[Layer], stochastic: bool, gpu: Gpu):
    """(plan, table, layer of each program) of the merge and of the factors' new beginning."""
    weight_dtype, factor_dtype, has_low, dense, _ = kind
    itemsize = max(factor_dtype.itemsize, weight_dtype.itemsize)
    tile = tiles.restart_tile(layers[0].A.shape[0], gpu, itemsize, dense)
    counts = [_tiles(layer.weight, tile.block_m, tile.block_n) for layer in layers]
    counts_of_A = [_tiles(layer.A, *A_BLOCK) for layer in layers]
    rows = [layer.fields(sum(counts[:i]), sum(counts_of_A[:i])) for i, layer in enumerate(layers)]
    device = layers[0].weight.device
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    names = {"WEIGHT_TYPE": _triton(weight_dtype), "FACTOR_TYPE": _triton(factor_dtype)}
    merge = dict(
        names, DENSE=dense, HAS_LOW=has_low, STOCHASTIC=stochastic and weight_dtype.itemsize == 2,
        BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=tile.block_k,
        PRECISION="tf32x3" if weight_dtype.itemsize == 2 else "ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    yield Plan(merge_and_reinit_kernel, (sum(counts), 1, 1), merge), table, _owners(counts, device)
    names.pop("WEIGHT_TYPE")
    reinit = dict(names, BLOCK_R=A_BLOCK[0], BLOCK_K=A_BLOCK[1], num_warps=8, num_stages=1)
    yield Plan(reinit_kernel, (sum(counts_of_A), 1, 1), reinit), table, _owners(counts_of_A, device)


def _tiles(matrix: torch.Tensor, block_rows: int, block_cols: int) -> int:
    return ceil(matrix.shape[0] / block_rows) * ceil(matrix.shape[1] / block_cols)


def _owners(counts: list[int], device) -> torch.Tensor:
    """Which layer each program works on."""
    owners = torch.arange(len(counts), dtype=torch.int32)
    return owners.repeat_interleave(torch.tensor(counts)).to(device)


def _triton(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))
