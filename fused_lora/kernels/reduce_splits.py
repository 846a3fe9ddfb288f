"""Second pass of the split sums: slices are added in a fixed order, so the same inputs give the same bits."""

from math import ceil

import triton
import triton.language as tl

from .launch import Plan, planned

BLOCK = 256
SPLITS_AT_ONCE = 16


@triton.jit
def _reduce_block(parts, out, block, numel, splits, BLOCK: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        mask = (split < splits)[:, None] & (offs < numel)[None, :]
        acc += tl.sum(tl.load(parts + split.to(tl.int64)[:, None] * numel + offs[None, :], mask=mask, other=0.0), 0)
    tl.store(out + offs, acc.to(out.dtype.element_ty), mask=offs < numel)


@triton.jit
def reduce_splits_kernel(
    parts_a, out_a, parts_b, out_b, numel_a, splits_a, numel_b, splits_b,
    BLOCK: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out = parts.sum(0) for two (splits, numel) fp32 workspaces in one launch; numel_b may be 0."""
    pid = tl.program_id(0)
    blocks_a = tl.cdiv(numel_a, BLOCK)
    if pid < blocks_a:
        _reduce_block(parts_a, out_a, pid, numel_a, splits_a, BLOCK, SPLITS_AT_ONCE)
    else:
        _reduce_block(parts_b, out_b, pid - blocks_a, numel_b, splits_b, BLOCK, SPLITS_AT_ONCE)


def reduce_splits(*pairs):
    """out.copy_(parts.sum(0)) for one or two (parts, out) pairs: parts fp32, both contiguous and freshly allocated."""
    (parts_a, out_a), (parts_b, out_b) = pairs[0], pairs[-1]
    sizes = (out_a.numel(), parts_a.shape[0], out_b.numel() if len(pairs) > 1 else 0, parts_b.shape[0])
    key = (reduce_splits, out_a.dtype, out_b.dtype, out_a.device, *sizes)
    planned(key, lambda: _plan(sizes)).run((), (parts_a, out_a, parts_b, out_b))


def _plan(sizes: tuple[int, ...]) -> Plan:
    grid = (ceil(sizes[0] / BLOCK) + ceil(sizes[2] / BLOCK), 1, 1)
    return Plan(reduce_splits_kernel, grid, dict(BLOCK=BLOCK, SPLITS_AT_ONCE=SPLITS_AT_ONCE), sizes=sizes)
