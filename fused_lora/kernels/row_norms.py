"""The norms of the rows of W + scale B A, which is made in registers and never stored: W is read once."""

from math import ceil

import torch
import triton
import triton.language as tl

from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import load_tile
from .tiles import Gpu, rank_block

# Rows of a program: two programs for each of an H200's SMs where W has 4096 rows; and columns at once.
BLOCK_N, BLOCK_K = 16, 256


@triton.jit
def row_norms_kernel(
    weight, A, B, norms, scale_ptr,
    N, K, R,
    stride_weight_row, stride_weight_col, stride_A_row, stride_A_col, stride_B_row, stride_B_col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One loop, whose loads Triton issues ahead: the steps over r are unrolled."""
    row = tl.program_id(0) * BLOCK_N
    scale = tl.load(scale_ptr).to(tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for col in tl.range(0, K, BLOCK_K):
        own = load_tile(weight, row, col, N, K, stride_weight_row, stride_weight_col, BLOCK_N, BLOCK_K, False)
        update = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for step in tl.static_range(0, RANK_STEPS):
            b = load_tile(B, row, step * BLOCK_R, N, R, stride_B_row, stride_B_col, BLOCK_N, BLOCK_R, False)
            a = load_tile(A, step * BLOCK_R, col, R, K, stride_A_row, stride_A_col, BLOCK_R, BLOCK_K, False)
            update = tl.dot(b, a, update, input_precision=PRECISION)
        entries = own.to(tl.float32) + scale * update  # beyond K both are zero
        squares += entries * entries
    offs = row + tl.arange(0, BLOCK_N)
    tl.store(norms + offs, tl.sqrt(tl.sum(squares, 1)), mask=offs < N)


def row_norms(weight, A, B, scale, gpu: Gpu):
    """(N,) float32; factors in weight's dtype, all strides."""
    key = (Layout.of(weight), Layout.of(A), Layout.of(B), gpu)
    norms = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    planned((row_norms, *key, *pointers_aligned(scale)), lambda: _plan(*key)).run((), (weight, A, B, norms, scale))
    return norms


def _plan(weight: Layout, A: Layout, B: Layout, gpu: Gpu) -> Plan:
    block_k = BLOCK_K if weight.dtype.itemsize == 2 else BLOCK_K // 4
    block_r = rank_block(A.rows, 64 if weight.dtype.itemsize == 2 else 16)
    return Plan(
        row_norms_kernel,
        (ceil(weight.rows / BLOCK_N), 1, 1),
        dict(
            BLOCK_N=BLOCK_N, BLOCK_K=block_k, BLOCK_R=block_r, RANK_STEPS=ceil(A.rows / block_r), PRECISION="ieee",
            num_warps=4, num_stages=3,
        ),
        sizes=(weight.rows, weight.cols, A.rows, *weight.strides, *A.strides, *B.strides),
    )  # fmt: skip
