"""Base and expand in one GEMM: out = gain * (lhs @ weight + dropout(low @ factor)) + bias, one fp32 accumulator.

Forward: lhs x, weight W^T, low xa, factor B^T. Backward: lhs dy, weight W, low dxa, factor A, out dx.
"""

from math import ceil

import torch
import triton
import triton.language as tl

from ..measured_file import bucket
from . import launch, tiles
from .autotune import tuned
from .dropout import Dropout, keep_mask
from .launch import Layout, Plan, dense, planned, pointers_aligned
from .primitives import accumulate, accumulate_strided, from_first, grouped_order, in_eights, store_dense_tile
from .tiles import Gpu, Tile

GROUP_M = 8


@triton.jit
def finish_tile(
    out, acc, gain_ptr, bias_ptr, row, col, M, N, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    offs_n = col + tl.arange(0, BLOCK_N)
    if HAS_GAIN:
        acc *= tl.load(gain_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if TMA:
        # Two halves through one staging buffer of half a tile: the shared memory saved pays for a fourth stage.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        out.store([row, col], left.to(out.dtype))
        out.store([row, col + BLOCK_N // 2], right.to(out.dtype))
    else:
        store_dense_tile(out, acc, row, col, M, N, BLOCK_M, BLOCK_N, stride_out)


@triton.jit
def one_loop_tiles(
    lhs, weight, low, factor, gain_ptr, bias_ptr, out, first, last, M, N, K, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, RHS_T: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TMA only. The steps over r follow those over K in one loop, by choosing the descriptor, and the loop is
    flattened with the one over tiles: the next tile's loads are in flight during this one's epilogue.
    (8192, 4096, 4096, r = 16) on an H100: 391 us nested, 376 us flattened; (32768, 1024, 1024, 128): 125 and 114.
    """
    base_steps = tl.cdiv(K, BLOCK_K)
    steps = base_steps + tl.cdiv(R, BLOCK_K)
    for tile in tl.range(first, last, tl.num_programs(0), flatten=True):
        row, col = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, steps):
            is_base = step < base_steps
            if is_base:
                step_lhs = lhs
                step_rhs = weight
            else:
                step_lhs = low
                step_rhs = factor
            k = tl.where(is_base, step, step - base_steps) * BLOCK_K
            a = step_lhs.load([row, k])
            b = step_rhs.load([col, k]).T if RHS_T else step_rhs.load([k, col])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        finish_tile(out, acc, gain_ptr, bias_ptr, row, col, M, N, None, BLOCK_M, BLOCK_N, HAS_GAIN, HAS_BIAS, True)


@triton.jit
def _two_loop_tiles(
    lhs, weight, low, factor, gain_ptr, bias_ptr, out, seed, threshold, first_col, first, last, M, N, K, R,
    stride_low_row, stride_low_col, stride_factor_row, stride_factor_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, RHS_T: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TMA with dropout, or with a low-rank product by pointers, which comes first: one accumulator can be masked."""
    for tile in tl.range(first, last, tl.num_programs(0)):
        row, col = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = accumulate(
            acc, low, factor, row, col, M, N, R, 0, R,
            stride_low_row, stride_low_col, stride_factor_row, stride_factor_col, 0, 0,
            BLOCK_M, BLOCK_N, BLOCK_R, RHS_T, False, LOW_TMA, LOW_TMA, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            acc = tl.where(keep_mask(seed, row, from_first(col, first_col), threshold, BLOCK_M, BLOCK_N), acc, 0.0)
        acc = accumulate(
            acc, lhs, weight, row, col, M, N, K, 0, K, 0, 1, 0, 1, 0, 0,
            BLOCK_M, BLOCK_N, BLOCK_K, RHS_T, False, True, True, PRECISION,
        )  # fmt: skip
        finish_tile(out, acc, gain_ptr, bias_ptr, row, col, M, N, None, BLOCK_M, BLOCK_N, HAS_GAIN, HAS_BIAS, True)


@triton.jit
def _strided_tile(
    lhs, weight, low, factor, gain_ptr, bias_ptr, out, seed, threshold, first_col, tile, M, N, K, R,
    stride_lhs_row, stride_lhs_k, stride_weight_k, stride_weight_col,
    stride_low_row, stride_low_rank, stride_factor_rank, stride_factor_col, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pointers of any stride. The low-rank product comes first, so that one accumulator can be masked."""
    row, col = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_strided(
        acc, low, factor, row, col, M, N, 0, R,
        stride_low_row, stride_low_rank, stride_factor_rank, stride_factor_col, 0, 0,
        BLOCK_M, BLOCK_N, BLOCK_R, EVEN_R, WIDE, "", PRECISION,
    )  # fmt: skip
    if DROPOUT:
        acc = tl.where(keep_mask(seed, row, from_first(col, first_col), threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    acc = accumulate_strided(
        acc, lhs, weight, row, col, M, N, 0, K,
        stride_lhs_row, stride_lhs_k, stride_weight_k, stride_weight_col, 0, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDE, "", PRECISION,
    )  # fmt: skip
    finish_tile(out, acc, gain_ptr, bias_ptr, row, col, M, N, stride_out, BLOCK_M, BLOCK_N, HAS_GAIN, HAS_BIAS, False)


@triton.jit(do_not_specialize=["threshold", "first_col"])
def expand_kernel(
    lhs, weight, low, factor, out, gain_ptr, bias_ptr, seed_ptr, threshold, first_col,
    M, N, K, R,
    stride_lhs_row, stride_lhs_col, stride_weight_row, stride_weight_col,
    stride_low_row, stride_low_col, stride_factor_row, stride_factor_col, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, RHS_T: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, LOW_TMA: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    EIGHTS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent where TMA reads lhs and weight; without, one program a tile. first_col and stride_out are None, and no
    code, where out is all of a result."""
    first = tl.program_id(0)
    last = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if TMA and LOW_TMA and not DROPOUT:
        one_loop_tiles(
            lhs, weight, low, factor, gain_ptr, bias_ptr, out, first, last, M, N, K, R,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, RHS_T, HAS_GAIN, HAS_BIAS, PRECISION,
        )  # fmt: skip
    elif TMA:
        _two_loop_tiles(
            lhs, weight, low, factor, gain_ptr, bias_ptr, out, tl.load(seed_ptr) if DROPOUT else 0, threshold,
            first_col, first, last, M, N, K, R, stride_low_row, stride_low_col, stride_factor_row, stride_factor_col,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, RHS_T, HAS_GAIN, HAS_BIAS, DROPOUT, LOW_TMA, PRECISION,
        )  # fmt: skip
    else:
        N, K, R = in_eights(N, EIGHTS and not RHS_T), in_eights(K, EIGHTS), in_eights(R, EIGHTS)
        stride_lhs_row, stride_weight_row = in_eights(stride_lhs_row, EIGHTS), in_eights(stride_weight_row, EIGHTS)
        stride_low_row, stride_factor_row = in_eights(stride_low_row, EIGHTS), in_eights(stride_factor_row, EIGHTS)
        _strided_tile(
            lhs, weight, low, factor, gain_ptr, bias_ptr, out, tl.load(seed_ptr) if DROPOUT else 0, threshold,
            first_col, first, M, N, K, R, stride_lhs_row, stride_lhs_col,
            stride_weight_col if RHS_T else stride_weight_row, stride_weight_row if RHS_T else stride_weight_col,
            stride_low_row, stride_low_col,
            stride_factor_col if RHS_T else stride_factor_row, stride_factor_row if RHS_T else stride_factor_col,
            stride_out, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, HAS_GAIN, HAS_BIAS, DROPOUT, EVEN_K, EVEN_R, WIDE,
            PRECISION,
        )  # fmt: skip


def expand(
    lhs, weight, low, factor, bias, dropout: Dropout, gpu: Gpu, precision: str, *, rhs_t: bool, gain=None,
    tile: Tile | None = None, out=None, first_col: int | None = None,
):  # fmt: skip
    """gain * (lhs @ weight + dropout(low @ factor)) + bias, weight and factor transposed with rhs_t.

    out may be given: columns of a wider result, of which dropout has to know the first one's number.
    """
    layouts = [Layout.of(matrix) for matrix in (lhs, weight, low, factor)]
    bias_dtype = None if bias is None else bias.dtype
    key = (*layouts, gain is not None, bias_dtype, dropout.active, gpu, precision, rhs_t, tile)
    key += (None if out is None else Layout.of(out),)

    def measured(default: Tile, candidates: list[Tile], tma: bool, *flags: bool) -> Tile:
        bucket_key = bucket("expand", *lhs.shape, out.shape[1], low.shape[1], lhs.dtype, rhs_t, tma, *flags)
        return tuned(
            gpu, bucket_key, default, candidates,
            lambda t: expand(
                lhs, weight, low, factor, bias, dropout, gpu, precision, rhs_t=rhs_t, gain=gain, tile=t, out=out,
                first_col=first_col,
            ),
            lhs, tma,
        )  # fmt: skip

    if out is None:
        out = torch.empty(lhs.shape[0], weight.shape[0 if rhs_t else 1], dtype=lhs.dtype, device=lhs.device)
    plan = planned(
        (expand, *key, first_col is None, *pointers_aligned(gain, bias, dropout.seed)), lambda: _plan(*key, measured)
    )
    plan.run((lhs, weight, low, factor, out), (gain, bias, dropout.seed, dropout.threshold, first_col))
    return out


def _most_ranks(tile: Tile, gpu: Gpu, dropout: bool) -> int:
    """Of a step. Beside the mask, 32 ranks at once take two registers more than the largest tile of mma.sync leaves."""
    return 16 if dropout and gpu.has_mma_sync else tile.block_k


def _plan(
    lhs: Layout, weight: Layout, low: Layout, factor: Layout, gain: bool, bias_dtype, dropout: bool, gpu: Gpu,
    precision: str, rhs_t: bool, tile: Tile | None, out: Layout | None, measured,
) -> Plan:  # fmt: skip
    M, K, N, r = lhs.rows, lhs.cols, weight.rows if rhs_t else weight.cols, low.cols
    out = dense(M, N, lhs) if out is None else out
    is_whole = out.stride_row == N
    tma = all(layout.tma_ready(gpu) for layout in (lhs, weight, out))
    low_tma = tma and low.tma_ready(gpu) and factor.tma_ready(gpu)
    if tile is None:
        # Beside the mask, a stride and a first column take registers that the largest tile of mma.sync does not leave.
        large = launch.in_eights(lhs, weight) and (is_whole or not dropout)
        of_kind = (gpu, lhs.dtype.itemsize, tma, precision, large)
        tile = measured(tiles.expand_tile(M, N, *of_kind), tiles.expand_candidates(*of_kind), tma, low_tma, dropout)
    # Where rank and base share a loop, they share its step.
    step = tile.block_k if low_tma and not dropout else tiles.rank_block(r, _most_ranks(tile, gpu, dropout))
    stride_out = None if tma or is_whole else out.stride_row
    tile_count = ceil(M / tile.block_m) * ceil(N / tile.block_n)
    weight_block = (tile.block_n, tile.block_k) if rhs_t else (tile.block_k, tile.block_n)
    factor_block = (tile.block_n, step) if rhs_t else (step, tile.block_n)
    base_blocks = ((tile.block_m, tile.block_k), weight_block) if tma else (None, None)
    low_blocks = ((tile.block_m, step), factor_block) if low_tma else (None, None)
    return Plan(
        expand_kernel,
        (min(tile_count, gpu.sm_count) if tma else tile_count, 1, 1),
        dict(
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=step, GROUP_M=GROUP_M,
            RHS_T=rhs_t, HAS_GAIN=gain, HAS_BIAS=bias_dtype is not None, DROPOUT=dropout, TMA=tma, LOW_TMA=low_tma,
            EVEN_K=not tma and K % tile.block_k == 0, EVEN_R=not tma and r % step == 0,
            EIGHTS=not tma and launch.only_in_eights(lhs, weight, low, factor),
            WIDE=not tma and launch.is_wide(lhs, weight, low, factor), PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        (*base_blocks, *low_blocks, (tile.block_m, tile.block_n // 2) if tma else None),
        (M, N, K, r, *lhs.strides, *weight.strides, *low.strides, *factor.strides, stride_out),
    )  # fmt: skip
