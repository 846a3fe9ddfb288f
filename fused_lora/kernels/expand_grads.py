"""dx, dA and dB in one persistent launch: the tiles of the factor gradients run between those of the dx GEMM.

dx is bound by the tensor cores and the gradients by memory, so each program takes its gradient tiles at another
moment of its run.
"""

import torch
import triton
import triton.language as tl

from ..measured_file import bucket
from . import tiles
from .autotune import tuned
from .expand import GROUP_M, one_loop_tiles
from .factor_grads import SplitGrad, factor_grad_tile, finish
from .launch import Layout, Plan, planned
from .tiles import Gpu, Tile


@triton.jit
def expand_grads_kernel(
    dy, weight, dxa, factor, dx,
    dy_tokens, dxa_tokens, x, xa, dA, dB, dA_tiles, grad_tiles, dA_m_per_split, dB_m_per_split,
    M, N, K, R,
    stride_dA_split, stride_dA_row, stride_dA_col, stride_dB_split, stride_dB_row, stride_dB_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All matrices but dA and dB are descriptors; dy_tokens and dxa_tokens are dy and dxa in the gradients' blocks."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N)
    rounds = tl.cdiv(tiles, programs)
    turn = pid + (pid * rounds // programs) * programs  # the tile of dx that waits for this program's gradients
    one_loop_tiles(
        dy, weight, dxa, factor, None, None, dx, pid, tl.minimum(turn, tiles), M, K, N, R,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, False, False, False, PRECISION,
    )  # fmt: skip

    # Programs without a tile of dx in the last wave are the first to be dealt a second gradient tile.
    for tile in range((pid + rounds * programs - tiles) % programs, grad_tiles, programs):
        factor_grad_tile(
            tile, x, dxa_tokens, dA, dA_tiles, dA_m_per_split, dy_tokens, xa, dB, dB_m_per_split, 0, 0,
            M, N, K, R,
            0, 1, 0, 1, stride_dA_split, stride_dA_row, stride_dA_col,
            0, 1, 0, 1, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, False, True, PRECISION,
        )  # fmt: skip

    one_loop_tiles(
        dy, weight, dxa, factor, None, None, dx, turn, tiles, M, K, N, R,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, False, False, False, PRECISION,
    )  # fmt: skip


def can_expand_grads(gpu: Gpu, *operands) -> bool:
    """The copy engine must be able to read every operand; dx, shaped as x, is then writable too."""
    return gpu.has_tma and all(Layout.of(matrix).tma_ready(gpu) for matrix in operands)


def expand_grads(dy, weight, dxa, factor, x, xa, A, B, gpu: Gpu, tile: Tile | None = None):
    """(dx, dA, dB): dx = dy @ weight + dxa @ factor, dA = dxa^T x, dB = dy^T xa; 16-bit operands.

    factor is A in the operands' dtype; the gradients take the dtypes of A and B.
    """
    layouts = [Layout.of(matrix) for matrix in (dy, weight, factor, x)]
    key = (*layouts, A.shape[0], A.dtype, B.dtype, gpu, tile)

    def measured(default: Tile, candidates: list[Tile]) -> Tile:
        return tuned(
            gpu, bucket("expand_grads", *dy.shape, x.shape[1], A.shape[0], x.dtype), default, candidates,
            lambda t: expand_grads(dy, weight, dxa, factor, x, xa, A, B, gpu, t), x, True,
        )  # fmt: skip

    dA, dB, plan = planned((expand_grads, *key), lambda: _plan(*key, measured))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dA_parts, dA_grad = dA.allocate(A)
    dB_parts, dB_grad = dB.allocate(B)
    plan.run((dy, weight, dxa, factor, dx, dy, dxa, x, xa), (dA_parts, dB_parts))
    finish((dA_parts, dA_grad), (dB_parts, dB_grad))
    return dx, dA_grad, dB_grad


def _plan(
    dy: Layout,
    weight: Layout,
    factor: Layout,
    x: Layout,
    r: int,
    A_dtype,
    B_dtype,
    gpu: Gpu,
    tile: Tile | None,
    measured,
) -> tuple[SplitGrad, SplitGrad, Plan]:
    M, N, K = dy.rows, dy.cols, x.cols
    if tile is None:
        of_kind = (gpu, x.dtype.itemsize, True, "ieee")
        tile = measured(tiles.expand_tile(M, K, *of_kind), tiles.expand_candidates(*of_kind))
    grad_tile = tiles.factor_grad_tile(r, gpu, x.dtype.itemsize, "ieee", tile.num_warps)
    dA, dB = SplitGrad.plan(M, N, K, r, grad_tile, gpu, x.dtype.itemsize)
    lhs_block, rhs_block = (tile.block_m, tile.block_k), (tile.block_k, tile.block_n)
    big_block, low_block = (grad_tile.block_k, grad_tile.block_m), (grad_tile.block_k, grad_tile.block_n)
    return dA, dB, Plan(
        expand_grads_kernel,
        (gpu.sm_count, 1, 1),
        dict(
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M,
            BLOCK_C=grad_tile.block_m, BLOCK_R=grad_tile.block_n, BLOCK_T=grad_tile.block_k, PRECISION="ieee",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        (
            lhs_block, rhs_block, lhs_block, rhs_block, (tile.block_m, tile.block_n // 2),
            big_block, low_block, big_block, low_block,
        ),
        (
            dA.tile_count, dA.tile_count + dB.tile_count, dA.m_per_split, dB.m_per_split, M, N, K, r,
            *dA.strides, *dB.strides,
        ),
    )  # fmt: skip
