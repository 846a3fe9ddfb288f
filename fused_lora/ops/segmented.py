"""Parts whose rows have adapters of their own: A and B are slabs of all adapters of a linear, and tables say which of
their ranks a row has.

    weight (N, K)   A (R, K)   B (N, R)   scale (R / 16,), of each slice of 16 ranks

dA and dB are of the ranks of the pass's windows (segments/plan.py), one window after another, dB by columns; and so are
xa and dxa in plain torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, choices, segments
from . import parts as of_parts
from .alone import kernel_bias, like, no_autocast, rows_of
from .library import ops
from .parts import Part, columns


class Segments(NamedTuple):
    """Of one part's rows."""

    tables: segments.Tables
    window: int

    @property
    def ranks(self) -> int:
        return self.window * self.tables.windows.shape[0]


def flatten(each: Sequence[segments.Tables]) -> list[Tensor]:
    return [table for tables in each for table in tables]


def unflatten(tensors: Sequence[Tensor] | None, window: int, parts: int) -> list[Segments | None]:
    """Of each part; None for parts whose rows all have the same factors."""
    if tensors is None:
        return [None] * parts
    size = len(segments.Tables._fields)
    return [Segments(segments.Tables(*tensors[i * size : (i + 1) * size]), window) for i in range(parts)]


def obstacle(x: Tensor, parts: Sequence[Part], each: Sequence[Segments], gated: bool) -> str | None:
    """Why csrc has no kernel for parts that read x, or None."""
    readable = all(backends.csrc_reads(part.weight, part.A, part.B) for part in parts)
    found = obstacle_on(x.device, x.dtype, each[0].window, readable)
    if found is not None:
        return found
    if gated:
        return "a gated MLP whose rows have adapters of their own"
    if any(len(of.tables.windows) == 0 for of in each):
        return "no row has an adapter"
    if x.dtype is torch.float16 and any(len(of.tables.blocks) > 1 for of in each):
        return "rows with several adapters in float16, whose scales would need room of several sizes"
    return None


def obstacle_on(device: torch.device, dtype: torch.dtype, window: int, readable: bool) -> str | None:
    """Why csrc has no kernel with segments for a dtype on a device, or None; readable as by backends.csrc_reads."""
    return choices.together_obstacle(device, dtype, (window,), readable)


def weight_obstacle(x: Tensor, weight: Tensor, window: int) -> str | None:
    """Why csrc has no kernel with segments for x, a weight and slabs in the weight's dtype, or None."""
    dtype = of_parts.autocast_dtype(x) or x.dtype
    return obstacle_on(x.device, dtype, window, backends.csrc_reads(weight, weight, weight))


def low_shape(x: Tensor, part: Part, of: Segments, in_csrc: bool) -> tuple[int, int]:
    """Of xa: in csrc boxes of 64 ranks and a block's rows, as many as there can be (csrc/work/segments.h)."""
    if not in_csrc:
        return x.shape[:-1].numel(), of.ranks
    (levels, blocks, _), windows = of.tables.blocks.shape, len(of.tables.windows)
    return of.window // segments.BOX * (levels * (blocks - 1) + windows) * segments.BLOCK, segments.BOX


def empty_grads(part: Part, of: Segments, need_dA: bool, need_dB: bool) -> tuple[Tensor, Tensor]:
    """dA and dB, or what stands for one that is not needed."""
    N, K = part.weight.shape
    dA = part.A.new_empty((of.ranks, K) if need_dA else 0)
    return dA, part.B.new_empty(of.ranks, N).t() if need_dB else part.B.new_empty(0)


def csrc_forward(x: Tensor, parts: Sequence[Part], each: Sequence[Segments]) -> list[Tensor]:
    """ys and xas."""
    tensors, tables = _for_kernels(x, parts, each)
    return ops.cuda_lora_parts_forward(x, tensors, 0.0, [], "none", tables, each[0].window)


def csrc_backward(dys, xs, parts: Sequence[Part], xas, dxas, need_dx: bool, needs, each: Sequence[Segments]) -> list:
    """dx, dAs, dBs and dbiases."""
    count, x = len(parts), xs[0]
    need_dAs, need_dBs, need_dbiases = columns(needs, count)
    tensors, tables = _for_kernels(x, parts, each)
    wanted = [*need_dAs, *need_dBs, *(False,) * count]
    dx, *grads = ops.cuda_lora_parts_backward(
        dys, xs, tensors, xas, dxas, 0.0, need_dx, wanted, [], [], False, [], tables, each[0].window
    )
    dBs = [dB.t() if need else dB for dB, need in zip(grads[count : 2 * count], need_dBs, strict=True)]
    dbiases = [
        _dbias(dy, part.bias) if need else x.new_empty(0, dtype=x.dtype if part.bias is None else part.bias.dtype)
        for dy, part, need in zip(dys, parts, need_dbiases, strict=True)
    ]
    return [dx, *grads[:count], *dBs, *dbiases]


def _dbias(dy: Tensor, bias: Tensor) -> Tensor:
    return rows_of(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(bias.dtype)


def _for_kernels(x: Tensor, parts: Sequence[Part], each: Sequence[Segments]) -> tuple[list, list[Tensor]]:
    """Parts with the slab of B^T for B, and tables."""
    pairs = [
        _gathered(part, of) if part.A.dtype != x.dtype else (part, of) for part, of in zip(parts, each, strict=True)
    ]
    tensors = [part._replace(B=part.B.t(), bias=kernel_bias(part.bias)) for part, _ in pairs]
    return of_parts.flatten(tensors), flatten([of.tables for _, of in pairs])


def _gathered(part: Part, of: Segments) -> tuple[Part, Segments]:
    """With slabs of the windows' ranks alone: kernels cast factors of another dtype, and cast all of a slab."""
    blocks, windows, rows = of.tables
    ranks = segments.ranks_of(part.A, *of)
    scale = part.scale[ranks[:: segments.SLICE] // segments.SLICE]
    first = torch.arange(len(windows), dtype=torch.int32, device=windows.device) * of.window
    tables = segments.Tables(
        blocks,
        torch.cat([first[:, None], windows[:, 1:]], 1),
        torch.stack([rows[..., 0], rows[..., 0] & 0xFFFFFF], 2),
    )
    return part._replace(A=part.A[ranks], B=part.B.t()[ranks].t(), scale=scale), of._replace(tables=tables)


def forward(x: Tensor, part: Part, of: Segments) -> tuple[Tensor, Tensor]:
    """(y, xa)."""
    weight, A, B, bias, scales, *_ = part
    with no_autocast(x):
        y, xa = segments.forward_ref(rows_of(x), weight, A, B, bias, scales, *of)
    return like(y, x), xa


def backward(dy: Tensor, x: Tensor, part: Part, xa: Tensor, dxa: Tensor | None, needs: Sequence[bool], of: Segments):
    """(dx, dA, dB, dxa), of the first three None where `needs` says so."""
    weight, A, B, _, scales, *_ = part
    rows = rows_of(dy)
    with no_autocast(x):
        dxa = segments.dxa_ref(rows, B, scales, *of) if dxa is None else dxa
        dx, dA, dB = segments.backward_ref(rows, rows_of(x), weight, A, B, xa, dxa, scales, *of, needs)
    return None if dx is None else like(dx, x), dA, dB, dxa
