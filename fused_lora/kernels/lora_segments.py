"""The LoRA linear in Triton whose rows have adapters of their own: matrices in, matrices out, no autograd. Equations
and symbols as in segments/formula.py, but for xa, which lies in boxes (segment_tables.py)."""

from ..reference import room
from ..segments import SLICE, Drops, Tables, ranks_of
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
    return segments_expand(x, weight, xa, up.to(x.dtype), bias, tables, window, None, gpu, precision, rhs_t=True), xa


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
        dx = segments_expand(dy, weight, dxa, A.to(x.dtype), None, tables, window, drops, gpu, precision, rhs_t=False)
    if need_dA or need_dB:
        of = (tables, window, drops, gpu, precision, (need_dA, need_dB))
        dA, dB = segments_factor_grads(x, dxa, dy, xa, (A.dtype, B.dtype), *of)
    more = room(scales, x.dtype) if need_dB else None
    if more is not None:
        dB.mul_(more[ranks_of(A, tables, window) // SLICE][:, None])
    return dx, dA, dB.t() if need_dB else None
