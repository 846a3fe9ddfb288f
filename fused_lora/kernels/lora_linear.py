"""The LoRA linear in Triton: matrices in, matrices out, no autograd. Equations and symbols as in reference.py."""

import torch

from ..formats import Stored
from ..reference import room
from .chunked import by_chunks, cut
from .dropout import Dropout
from .expand import expand
from .expand_grads import can_expand_grads, expand_grads
from .factor_grads import factor_grads
from .shrink import shrink
from .tiles import Gpu

NO_DROPOUT = Dropout()


def lora_linear_forward(x, weight, A, B, bias, scale, dropout: Dropout, gpu: Gpu, precision: str, gain=None):
    """(y, xa): two launches, shrink and expand; with a stored weight two for each chunk of it after the shrink."""
    more = room(scale, x.dtype)
    if more is not None:
        scale, B = scale / more, B * more
    xa = shrink(x, A.to(x.dtype), scale, dropout.keep_scale, dropout, gpu, precision, rhs_t=True)
    y = _expand(x, weight, xa, B.to(x.dtype), bias, NO_DROPOUT, gpu, precision, rhs_t=True, gain=gain)
    return y, xa


def lora_linear_backward(dy, x, weight, A, B, xa, scale, dropout: Dropout, gpu: Gpu, precision: str, needs, dxa=None):
    """(dx, dA, dB, dxa), None where needs says so; needs is of the first three. A dxa that is given is not made."""
    need_dx, need_dA, need_dB = needs
    factor_A, factor_B = A.to(x.dtype), B.to(x.dtype)
    if dxa is None and (need_dx or need_dA):
        dxa = shrink(dy, factor_B, scale, dropout.keep_scale, NO_DROPOUT, gpu, precision, rhs_t=False)
    dx = dA = dB = None
    together = all(needs) and not dropout.active and not isinstance(weight, Stored)
    if together and can_expand_grads(gpu, dy, weight, dxa, factor_A, x, xa):
        dx, dA, dB = expand_grads(dy, weight, dxa, factor_A, x, xa, A, B, gpu)
    else:
        if need_dx:
            dx = _expand(dy, weight, dxa, factor_A, None, dropout, gpu, precision, rhs_t=False)
        if need_dA or need_dB:
            dA, dB = factor_grads(x, dxa, A, dy, xa, B, dropout, gpu, precision, (need_dA, need_dB))
    more = room(scale, x.dtype) if need_dB else None
    return dx, dA, dB if more is None else dB.mul_(more), dxa


def _expand(lhs, weight, low, factor, bias, dropout: Dropout, gpu: Gpu, precision: str, *, rhs_t: bool, gain=None):
    """As expand, also with a stored weight."""
    if not isinstance(weight, Stored):
        return expand(lhs, weight, low, factor, bias, dropout, gpu, precision, rhs_t=rhs_t, gain=gain)

    def multiply(part, columns: slice, out, first_col: int | None):
        own = factor[columns] if rhs_t else factor[:, columns]
        expand(
            lhs, part, low, own, cut(bias, columns), dropout, gpu, precision, rhs_t=rhs_t, gain=cut(gain, columns),
            out=out, first_col=first_col if dropout.active else None,
        )  # fmt: skip

    return by_chunks(lhs, weight, rhs_t, multiply)


def forward_pass(x, weight, A, B, bias, scale, seed, gain, p: float, gpu: Gpu, precision: str, sizes: tuple[int, ...]):
    """lora_linear_forward, as it is replayed; y in x's leading sizes."""
    y, xa = lora_linear_forward(x, weight, A, B, bias, scale, Dropout(p, seed), gpu, precision, gain)
    return in_sizes(y, sizes), xa


def backward_pass(
    dy,
    x,
    weight,
    A,
    B,
    xa,
    scale,
    seed,
    dxa,
    p: float,
    gpu: Gpu,
    precision: str,
    sizes: tuple[int, ...],
    needs,
    keeps_dxa,
):
    """lora_linear_backward, as it is replayed; dx in x's leading sizes, dxa only where it was made and is wanted."""
    dx, *grads = lora_linear_backward(dy, x, weight, A, B, xa, scale, Dropout(p, seed), gpu, precision, needs, dxa)
    if dxa is not None or not keeps_dxa:
        grads[-1] = None
    return None if dx is None else in_sizes(dx, sizes), *grads


def stored_forward_pass(x, codes, scales, outer, A, B, *others):
    """forward_pass with a stored weight, whose tensors are inputs of their own."""
    return forward_pass(x, Stored(codes, scales, outer, B.shape[0], A.shape[1]), A, B, *others)


def stored_backward_pass(dy, x, codes, scales, outer, A, B, *others):
    return backward_pass(dy, x, Stored(codes, scales, outer, B.shape[0], A.shape[1]), A, B, *others)


def in_sizes(rows: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Rows in leading sizes, and no view, which could not be changed in place behind an autograd.Function."""
    return rows if len(sizes) == 1 else torch.ops.aten._unsafe_view(rows, [*sizes, rows.shape[1]])
