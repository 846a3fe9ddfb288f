"""The backward pass of y = gain sums + bias, by columns: gain dy, dgain = sum of dy sums, dbias = sum of dy.

One reading of dy and y. The sums over rows are made in slices, which are added in a fixed order.
"""

from math import ceil

import torch
import triton
import triton.language as tl

from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import load_tile, store_tile
from .reduce_splits import reduce_splits
from .tiles import Gpu

BLOCK_M, BLOCK_N = 32, 128
PROGRAMS_PER_SM = 4
LEAST_ROWS = 64  # of a slice


@triton.jit
def gain_backward_kernel(
    dy, y, bias_ptr, gain_ptr, dsums, dgain, dbias,
    M, N, m_per_split, stride_dy_row, stride_dy_col, stride_y_row, stride_y_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, WANTS_DBIAS: tl.constexpr,
):  # fmt: skip
    """A program has some columns of one slice of rows; dgain and dbias are (slices, N)."""
    blocks = tl.cdiv(N, BLOCK_N)
    split, col = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    offs = col + tl.arange(0, BLOCK_N)
    gain = tl.load(gain_ptr + offs, mask=offs < N, other=0.0)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ones = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in tl.range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        own = load_tile(dy, row, col, M, N, stride_dy_row, stride_dy_col, BLOCK_M, BLOCK_N, False).to(tl.float32)
        sums = load_tile(y, row, col, M, N, stride_y_row, stride_y_col, BLOCK_M, BLOCK_N, False).to(tl.float32)
        products += own * (sums - bias[None, :])
        if WANTS_DBIAS:
            ones += own
        store_tile(dsums, own * gain[None, :], row, col, M, N, N, 1, BLOCK_M, BLOCK_N, False)
    at = split.to(tl.int64) * N + offs
    # A gain of 0 has left nothing of the sums.
    safe = tl.where(gain == 0, 1.0, gain)
    tl.store(dgain + at, tl.where(gain == 0, 0.0, tl.sum(products, 0) / safe), mask=offs < N)
    if WANTS_DBIAS:
        tl.store(dbias + at, tl.sum(ones, 0), mask=offs < N)


def gain_backward(dy, y, bias, gain, gpu: Gpu, need_dbias: bool):
    """(gain dy in dy's dtype, dgain, dbias or None) for matrices of any strides; the sums in float32."""
    N = dy.shape[1]
    key = (Layout.of(dy), Layout.of(y), None if bias is None else bias.dtype, gpu, need_dbias)
    splits, plan = planned((gain_backward, *key, *pointers_aligned(bias, gain)), lambda: _plan(*key))
    dsums = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    slices = torch.empty(1 + need_dbias, splits, N, dtype=torch.float32, device=dy.device)
    plan.run((), (dy, y, bias, gain, dsums, slices[0], slices[-1]))
    sums = [torch.empty(N, dtype=torch.float32, device=dy.device) for _ in slices]
    reduce_splits(*zip(slices, sums, strict=True))
    return dsums, sums[0], sums[1] if need_dbias else None


def _plan(dy: Layout, y: Layout, bias_dtype, gpu: Gpu, need_dbias: bool) -> tuple[int, Plan]:
    """(slices of rows, launch)."""
    M, N = dy.rows, dy.cols
    blocks = ceil(N / BLOCK_N)
    wanted = max(1, PROGRAMS_PER_SM * gpu.sm_count // blocks)
    m_per_split = max(LEAST_ROWS, ceil(M / wanted / BLOCK_M) * BLOCK_M)
    splits = ceil(M / m_per_split)
    plan = Plan(
        gain_backward_kernel,
        (blocks * splits, 1, 1),
        dict(
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HAS_BIAS=bias_dtype is not None, WANTS_DBIAS=need_dbias, num_warps=4,
            num_stages=3,
        ),
        sizes=(M, N, m_per_split, *dy.strides, *y.strides),
    )  # fmt: skip
    return splits, plan
