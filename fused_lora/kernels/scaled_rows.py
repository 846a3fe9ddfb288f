"""gain W and gain B: the rows of a linear's matrices multiplied by its gain, each number rounded once."""

from math import ceil

import triton
import triton.language as tl

from .. import padding
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import load_tile, store_tile

BLOCK_N, BLOCK_K = 32, 128


@triton.jit
def scaled_rows_kernel(
    weight, B, gain_ptr, out_weight, out_B,
    N, K, R,
    stride_weight_row, stride_weight_col, stride_B_row, stride_B_col, stride_out_weight, stride_out_B,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has a tile of W, or one of B behind the last columns of W."""
    blocks, width = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K) * BLOCK_K
    row, col = tl.program_id(0) % blocks * BLOCK_N, tl.program_id(0) // blocks * BLOCK_K
    if col < width:
        _scale_tile(
            weight, gain_ptr, out_weight, row, col, N, K, stride_weight_row, stride_weight_col, stride_out_weight,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _scale_tile(
            B, gain_ptr, out_B, row, col - width, N, R, stride_B_row, stride_B_col, stride_out_B, BLOCK_N, BLOCK_K
        )


@triton.jit
def _scale_tile(
    matrix, gain_ptr, out, row, col, rows, cols, stride_row, stride_col, stride_out,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    offs = row + tl.arange(0, BLOCK_ROWS)
    gain = tl.load(gain_ptr + offs, mask=offs < rows, other=0.0)
    tile = load_tile(matrix, row, col, rows, cols, stride_row, stride_col, BLOCK_ROWS, BLOCK_COLS, False)
    scaled = tile.to(tl.float32) * gain[:, None]
    store_tile(out, scaled, row, col, rows, cols, stride_out, 1, BLOCK_ROWS, BLOCK_COLS, False)


def scaled_rows(weight, B, gain, need_weight: bool):
    """(gain W or None, gain B) in their dtypes, with padded rows; weight (N, K), B (N, r) of any strides."""
    out_weight = padding.empty(*weight.shape, weight) if need_weight else None
    out_B = padding.empty(*B.shape, B)
    written = out_B if out_weight is None else out_weight
    key = (*map(Layout.of, (weight, B, written, out_B)), need_weight)
    plan = planned((scaled_rows, *key, *pointers_aligned(gain)), lambda: _plan(*key))
    plan.run((), (weight, B, gain, written, out_B))
    return out_weight, out_B


def _plan(weight: Layout, B: Layout, out_weight: Layout, out_B: Layout, need_weight: bool) -> Plan:
    N, K, r = weight.rows, weight.cols if need_weight else 0, B.cols
    return Plan(
        scaled_rows_kernel,
        (ceil(N / BLOCK_N) * (ceil(K / BLOCK_K) + ceil(r / BLOCK_K)), 1, 1),
        dict(BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=1),
        sizes=(N, K, r, *weight.strides, *B.strides, out_weight.strides[0], out_B.strides[0]),
    )
