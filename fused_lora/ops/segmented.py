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
from .library import launching, ops
from .parts import Part, columns


class Segments(NamedTuple):
    """Of one part's rows. thresholds are segments.Drops' where adapters drop, by the part's seed."""

    tables: segments.Tables
    window: int
    thresholds: Tensor | None = None

    @property
    def ranks(self) -> int:
        return self.window * self.tables.windows.shape[0]


TENSORS = len(segments.Tables._fields) + 1  # of a part


def flatten(each: Sequence[Segments]) -> list[Tensor]:
    """Tables and thresholds, none as an empty tensor."""
    return [tensor for of in each for tensor in (*of.tables, _or_empty(of.thresholds, of.tables.rows))]


def with_own_thresholds(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What flatten gave, with thresholds that nobody else has."""
    return [each.clone() if i % TENSORS == TENSORS - 1 else each for i, each in enumerate(tensors)]


def _or_empty(thresholds: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if thresholds is None else thresholds


def unflatten(tensors: Sequence[Tensor] | None, window: int, parts: int) -> list[Segments | None]:
    """Of each part; None for parts whose rows all have the same factors."""
    if tensors is None:
        return [None] * parts
    return [_segments(tensors[i * TENSORS : (i + 1) * TENSORS], window) for i in range(parts)]


def _segments(tensors: Sequence[Tensor], window: int) -> Segments:
    *tables, thresholds = tensors
    return Segments(segments.Tables(*tables), window, thresholds if thresholds.numel() else None)


def of_routed(routed) -> Segments:
    """Of an ops.Routed."""
    return Segments(routed.tables, routed.window, routed.thresholds)


def drops_of(part: Part, of: Segments) -> segments.Drops | None:
    return None if of.thresholds is None else segments.Drops(part.seed, of.thresholds)


def obstacle(
    device: torch.device, dtype: torch.dtype, parts: Sequence[Part], each: Sequence[Segments], gated: bool
) -> str | None:
    """Why csrc has no kernel for parts of one x of a dtype (gated: or of an MLP), or None."""
    if any(part.A.dtype != parts[0].A.dtype for part in parts):
        return "their factors have dtypes of their own"
    if any(part.weight.numel() == 0 for part in parts):
        return "there is nothing to compute"
    readable, window = all(choices.csrc_reads(part.weight, part.A, part.B) for part in parts), each[0].window
    drop = [of.thresholds is not None for of in each]
    choice = choices.choose_segments(device, dtype, window, readable, any(drop))
    if choice.name != "cuda":
        return choice.reason
    if (mixed := choices.dropout_obstacle(drop)) is not None:
        return mixed
    if any(len(of.tables.windows) == 0 for of in each):
        return "no row has an adapter"
    if dtype is torch.float16 and any(len(of.tables.blocks) > 1 for of in each):
        return "rows with several adapters in float16, whose scales would need room of several sizes"
    return choices.gated_segments_obstacle(device, window, any(drop)) if gated else None


def in_csrc(x: Tensor, parts: Sequence[Part], each: Sequence[Segments], gated: bool) -> bool:
    """Whether its kernels take all parts of x at once."""
    return x.numel() > 0 and obstacle(x.device, x.dtype, parts, each, gated) is None


def backend(x: Tensor, part: Part, of: Segments) -> str:
    """Of a part by itself."""
    if x.numel() == 0 or part.weight.numel() == 0 or len(of.tables.windows) == 0:
        return "reference"
    reason = obstacle(x.device, x.dtype, [part], [of], False)
    if reason is None:
        return "cuda"
    return choices.choose_without_csrc(x.device, x.dtype, reason).name


def in_kernels(x: Tensor, parts: Sequence[Part], each: Sequence[Segments], gated: bool) -> list[bool]:
    """Of each part: csrc takes all at once, or else one after another is asked for a backend."""
    if in_csrc(x, parts, each, gated):
        return [True] * len(parts)
    return [backend(x, part, of) != "reference" for part, of in zip(parts, each, strict=True)]


def weight_obstacle(x: Tensor, weight: Tensor, window: int) -> str | None:
    """Why no kernel has segments for x, a weight and slabs in the weight's dtype, or None."""
    dtype = of_parts.autocast_dtype(x) or x.dtype
    found = choices.choose_segments(x.device, dtype, window, choices.csrc_reads(weight, weight, weight), False)
    return found.reason if found.name == "reference" else None


def low_shape(x: Tensor, of: Segments, in_kernels: bool) -> tuple[int, int]:
    """Of xa: in kernels boxes of 64 ranks and a block's rows, as many as there can be (csrc/work/segments.h)."""
    if not in_kernels:
        return x.shape[:-1].numel(), of.ranks
    (levels, blocks, _), windows = of.tables.blocks.shape, len(of.tables.windows)
    return of.window // segments.BOX * (levels * (blocks - 1) + windows) * segments.BLOCK, segments.BOX


def empty_grads(part: Part, of: Segments, need_dA: bool, need_dB: bool) -> tuple[Tensor, Tensor]:
    """dA and dB, or what stands for one that is not needed."""
    N, K = part.weight.shape
    dA = part.A.new_empty((of.ranks, K) if need_dA else 0)
    return dA, part.B.new_empty(of.ranks, N).t() if need_dB else part.B.new_empty(0)


def csrc_forward(
    x: Tensor, parts: Sequence[Part], each: Sequence[Segments], act=(), keep: str = "none"
) -> list[Tensor]:
    """What lora_parts_forward returns."""
    tensors, tables = _for_kernels(x, parts, each)
    return ops.cuda_lora_parts_forward(x, tensors, 0.0, act, keep, tables, each[0].window)


def csrc_backward_gated(
    dys, xs, parts: Sequence[Part], xas, act, gated, factors: bool, each: Sequence[Segments]
) -> list:
    """dgate, dup, act(gate) up and dxa, as lora_parts_backward has them."""
    tensors, tables = _for_kernels(xs[0], parts, each)
    return ops.cuda_lora_parts_backward(
        dys, xs, tensors, xas, [None], 0.0, True, [False] * 3, act, gated, factors, [], tables, each[0].window
    )


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
    pairs = [_as_read(x, part, of) for part, of in zip(parts, each, strict=True)]
    tensors = [part._replace(B=part.B.t(), bias=kernel_bias(part.bias)) for part, _ in pairs]
    return of_parts.flatten(tensors), [table for _, of in pairs for table in (*of.tables, *_row_thresholds(of))]


def _row_thresholds(of: Segments) -> tuple[Tensor, ...]:
    """Of the tables' rows, where adapters drop."""
    return () if of.thresholds is None else (of.thresholds[of.tables.rows[..., 1]],)


def _as_read(x: Tensor, part: Part, of: Segments, changes: bool = False) -> tuple[Part, Segments]:
    """With slabs of the windows' ranks alone, where a pass changes factors: it changes all of a slab. It casts those of
    another dtype than x's."""
    if part.A.dtype == x.dtype and not changes:
        return part, of
    blocks, windows, rows = of.tables
    ranks = segments.ranks_of(part.A, of.tables, of.window)
    slices = ranks[:: segments.SLICE] // segments.SLICE
    thresholds = None if of.thresholds is None else of.thresholds[slices]
    first = torch.arange(len(windows), dtype=torch.int32, device=windows.device) * of.window
    tables = segments.Tables(
        blocks,
        torch.cat([first[:, None], windows[:, 1:]], 1),
        torch.stack([rows[..., 0], rows[..., 0] & 0xFFFFFF], 2),
    )
    part = part._replace(A=part.A[ranks], B=part.B.t()[ranks].t(), scale=part.scale[slices])
    return part, of._replace(tables=tables, thresholds=thresholds)


def forward(x: Tensor, part: Part, of: Segments) -> tuple[Tensor, Tensor]:
    """(y, xa) of a part by itself."""
    chosen = backend(x, part, of)
    if chosen == "cuda":
        y, xa = csrc_forward(x, [part], [of])
        return y, xa
    if chosen == "triton":
        return _triton_forward(x, part, of)
    weight, A, B, bias, scales, *_ = part
    with no_autocast(x):
        y, xa = segments.forward_ref(rows_of(x), weight, A, B, bias, scales, of.tables, of.window, drops_of(part, of))
    return like(y, x), xa


def backward(dy: Tensor, x: Tensor, part: Part, xa: Tensor, dxa: Tensor | None, needs: Sequence[bool], of: Segments):
    """(dx, dA, dB, dxa), of the first three None where `needs` says so."""
    chosen = backend(x, part, of)
    if chosen == "cuda":
        need_dx, need_dA, need_dB = needs
        dx, dA, dB, _ = csrc_backward([dy], [x], [part], [xa], [dxa], need_dx, (need_dA, need_dB, False), [of])
        return *(grad if need else None for grad, need in zip((dx, dA, dB), needs, strict=True)), dxa
    if chosen == "triton":
        return *_triton_backward(dy, x, part, xa, needs, of), dxa
    weight, A, B, _, scales, *_ = part
    rows = rows_of(dy)
    dxa = dxa_of(dy, part, of) if dxa is None else dxa
    with no_autocast(x):
        dx, dA, dB = segments.backward_ref(
            rows, rows_of(x), weight, A, B, xa, dxa, scales, of.tables, of.window, needs, drops_of(part, of)
        )
    return None if dx is None else like(dx, x), dA, dB, dxa


def dxa_of(dy: Tensor, part: Part, of: Segments) -> Tensor:
    """What `backward` makes of it in plain torch, of all the pass's ranks."""
    with no_autocast(dy):
        return segments.dxa_ref(rows_of(dy), part.B, part.scale, of.tables, of.window)


def _triton_forward(x: Tensor, part: Part, of: Segments) -> tuple[Tensor, Tensor]:
    from ..kernels.lora_segments import lora_segments_forward

    part, of = _as_read(x, part, of, x.dtype is torch.float16)
    with launching("forward", x):
        y, xa = lora_segments_forward(
            rows_of(x), part.weight, part.A, part.B, kernel_bias(part.bias), part.scale, of.tables, of.window,
            drops_of(part, of), *_machine(x),
        )  # fmt: skip
    return like(y, x), xa


def _triton_backward(dy: Tensor, x: Tensor, part: Part, xa: Tensor, needs: Sequence[bool], of: Segments):
    """(dx, dA, dB), None where `needs` says so."""
    from ..kernels.lora_segments import lora_segments_backward

    part, of = _as_read(x, part, of, x.dtype is torch.float16)
    with launching("backward", x):
        dx, dA, dB = lora_segments_backward(
            rows_of(dy), rows_of(x), part.weight, part.A, part.B, xa, part.scale, of.tables, of.window,
            drops_of(part, of), *_machine(x), needs,
        )  # fmt: skip
    return None if dx is None else like(dx, x), dA, dB


def _machine(x: Tensor) -> tuple:
    return backends.gpu(x.device), backends.precision(x.dtype)
