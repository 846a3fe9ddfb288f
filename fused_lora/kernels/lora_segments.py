"""The LoRA linear in Triton whose rows have adapters of their own: matrices in, matrices out, no autograd. Equations
and symbols as in segments/formula.py, but for xa, which lies in boxes (segment_tables.py)."""

from math import ceil

import torch

from ..formats import Stored
from ..reference import room
from ..segments import BLOCK, SLICE, Drops, Tables, ranks_of
from .chunked import by_chunks, cut
from .launch import record_launches
from .segments_expand import segments_expand
from .segments_factor_grads import segments_factor_grads
from .segments_shrink import segments_shrink
from .tiles import Gpu


def lora_segments_forward(
    x, weight, A, B, bias, scales, tables: Tables, window: int, drops: Drops | None, gpu: Gpu, precision: str
):
    """(y, xa): two launches, shrink and expand. A (R, K), B (N, R) slabs."""
    scales = scales.float()
    up, more = B.t(), room(scales, x.dtype)
    if more is not None:
        scales, up = scales / more, up * more.repeat_interleave(SLICE)[:, None]
    xa = segments_shrink(x, A.to(x.dtype), scales, tables, window, drops, gpu, precision)
    return _expand(x, weight, xa, up.to(x.dtype), bias, tables, window, None, gpu, precision, rhs_t=True), xa


def _expand(lhs, weight, low, factor, bias, tables: Tables, window: int, drops: Drops | None, *machine, rhs_t: bool):
    """As segments_expand, also with a stored weight."""
    if not isinstance(weight, Stored):
        return segments_expand(lhs, weight, low, factor, bias, tables, window, drops, *machine, rhs_t=rhs_t)

    def multiply(part, columns: slice, out, first_col: int | None):
        segments_expand(
            lhs, part, low, factor[:, columns], cut(bias, columns), tables, window, drops, *machine, rhs_t=rhs_t,
            out=out, first_col=None if drops is None else first_col,
        )  # fmt: skip

    return by_chunks(lhs, weight, rhs_t, multiply)


def lora_segments_backward(
    dy, x, weight, A, B, xa, scales, tables: Tables, window: int, drops: Drops | None, gpu: Gpu, precision: str, needs
):
    """(dx, dA, dB), None where needs says so; dA and dB of the windows' ranks, dB by columns."""
    need_dx, need_dA, need_dB = needs
    scales = scales.float()
    dxa = dx = dA = dB = None
    if need_dx or need_dA:
        dxa = segments_shrink(dy, B.t().to(x.dtype), scales, tables, window, None, gpu, precision)
    if need_dx:
        dx = _expand(dy, weight, dxa, A.to(x.dtype), None, tables, window, drops, gpu, precision, rhs_t=False)
    if need_dA or need_dB:
        of = (tables, window, drops, gpu, precision, (need_dA, need_dB))
        dA, dB = segments_factor_grads(x, dxa, dy, xa, (A.dtype, B.dtype), *of)
    more = room(scales, x.dtype) if need_dB else None
    if more is not None:
        dB.mul_(more[ranks_of(A, tables, window) // SLICE][:, None])
    return dx, dA, dB.t() if need_dB else None


def record(tokens: int, part, windows: int, window: int, drops: bool, gpu: Gpu, precision: str):
    """The launches of forward and of backward of so many tokens by a linear's slabs, found on the `meta` device."""
    empty = lambda *sizes, dtype=part.weight.dtype: torch.empty(*sizes, dtype=dtype, device="meta")  # noqa: E731
    blocks, numbers = ceil(tokens / BLOCK), (empty(1, dtype=torch.int64), empty(1, dtype=torch.int32))
    shapes = ((1, blocks, 4), (windows, 4), (1, blocks * BLOCK, 2))
    tables = Tables(*(empty(*shape, dtype=torch.int32) for shape in shapes))
    of = (tables, window, Drops(*numbers) if drops else None, gpu, precision)
    weight, scales = part.weight.to("meta"), part.scale.to("meta")
    A, B = (each.to("meta", weight.dtype) for each in (part.A, part.B))
    x, dy = (empty(tokens, size) for size in reversed(weight.shape))
    with record_launches() as forward:
        _, xa = lora_segments_forward(x, weight, A, B, part.bias, scales, *of)
    with record_launches() as backward:
        lora_segments_backward(dy, x, weight, A, B, xa, scales, *of, (True, True, True))
    return forward, backward
