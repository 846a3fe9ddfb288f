"""The one pair of ops behind linears, groups and MLPs: parts that read one x, forward and backward.

    plain    ys = gain (x W^T + scale dropout(x) A^T B^T) + bias of each part
    gated    hidden = act(y of the first) y of the second, made where they are computed, and differentiated where the
             gradient of hidden is

Which backend runs them is asked here; what autograd does with them is in autograd.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks, choices, padding, reference
from ..formats import Stored
from . import alone, gains, segmented
from .alone import rows_of
from .library import define, ops
from .parts import Part, columns, flatten, unflatten
from .segmented import Segments

MOST_PARTS = 4  # of one launch
KEEP = ("none", "sides", "factors")  # what a gated forward keeps: gate and up, or act(gate) and act'(gate) up


def obstacle(device: torch.device, dtype: torch.dtype, parts: Sequence[Part], gated: bool = False) -> str | None:
    """Why parts that read one x of a dtype are not one launch of csrc's, or None."""
    if len(parts) > MOST_PARTS:
        return f"they are more than {MOST_PARTS}"
    if any(part.weight.numel() == 0 for part in parts) or all(part.A.numel() == 0 for part in parts):
        return "there is nothing to compute"
    if any(part.A.dtype != parts[0].A.dtype for part in parts):
        return "their factors have dtypes of their own"
    with_factors = [part for part in parts if part.A.numel() > 0]
    ranks = tuple(part.r for part in with_factors)
    read = [part for part in parts if part.A.numel() > 0 or isinstance(part.weight, Stored)]
    readable = all(choices.csrc_reads(part.weight, part.A, part.B) for part in read)
    found = choices.together_obstacle(device, dtype, ranks, readable)
    return found or (choices.gated_obstacle(ranks) if gated else None)


def measured_obstacle(x: Tensor, parts: Sequence[Part], p: float) -> str | None:
    """Why fused_lora.tune's measurements leave not all parts to csrc, or None; x as obstacle's has it."""
    if not (x.is_cuda and choices.any_measured()):
        return None
    found = (choice(x, part, p) for part in parts if part.A.numel() > 0)
    return next((each.reason for each in found if each.name != "cuda"), None)


def _in_csrc(x: Tensor, parts: Sequence[Part], gated: bool, p: float) -> bool:
    if x.numel() == 0 or obstacle(x.device, x.dtype, parts, gated) is not None:
        return False
    return measured_obstacle(x, parts, p) is None


def choice(x: Tensor, part: Part, p: float) -> backends.Choice:
    """Of a part by itself, of as many rows as x has."""
    N, K = part.weight.shape
    M, readable = math.prod(x.shape[:-1]), choices.csrc_reads(part.weight, part.A, part.B)
    return choices.choose_lora_linear(x.device, x.dtype, part.r, readable, M, N, K, p)


def _backend(x: Tensor, part: Part, p: float) -> str:
    if x.numel() == 0 or part.weight.numel() == 0 or part.A.numel() == 0:
        return "reference"  # empty products have no tiles; the reference gets them right for free
    return choice(x, part, p).name


def _for_kernels(*parts: Part) -> list[Tensor | None]:
    return flatten([part._replace(bias=alone.kernel_bias(part.bias)) for part in parts])


def _forward(x, tensors, p, act, keep, tables=None, window=0):
    parts, gated = unflatten(tensors), bool(act)
    segments = segmented.unflatten(tables, window, len(parts))
    if tables is not None and segmented.in_csrc(x, parts, segments, gated):
        return segmented.csrc_forward(x, parts, segments, act, keep)
    if tables is None and _in_csrc(x, parts, gated, p):
        results = ops.cuda_lora_parts_forward(x, _for_kernels(*parts), p, act, keep)
        own = len(results) - len(parts)
        return [*results[:own], *(xa.contiguous() for xa in results[own:])]
    each = zip(parts, segments, strict=True)
    ys, xas = zip(*(_forward_alone(rows_of(x) if gated else x, part, p, of) for part, of in each), strict=True)
    if not gated:
        return [*ys, *xas]
    kept = reference.gated_factors(*ys, *act) if keep == "factors" else ys
    kept = [_padded(y) if keep != "none" else padding.empty(0, y.shape[1], x) for y in kept]
    return [_padded(reference.gated(*ys, *act)), *kept, *xas]


def _padded(y: Tensor) -> Tensor:
    return padding.empty(*y.shape, y).copy_(y)


def _forward_alone(x: Tensor, part: Part, p: float, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """(y, xa)."""
    if segments is not None:
        return segmented.forward(x, part, segments)
    weight, A, B, bias, scale, seed, gain = part
    y, xa = alone.forward(_backend(x, part, p), x, weight, A, B, bias, scale, seed, p, gain=gain)
    return y, xa.contiguous()


def _forward_fake(x, tensors, p, act, keep, tables=None, window=0):
    parts, M = unflatten(tensors), math.prod(x.shape[:-1])
    segments = segmented.unflatten(tables, window, len(parts))
    if tables is None:
        shapes = [(M, part.r) for part in parts]
    else:
        in_kernels = segmented.in_kernels(x, parts, segments, bool(act))
        shapes = [segmented.low_shape(x, of, found) for of, found in zip(segments, in_kernels, strict=True)]
    xas = [x.new_empty(shape) for shape in shapes]
    if not act:
        return [x.new_empty((*x.shape[:-1], part.weight.shape[0])) for part in parts] + xas
    F = parts[0].weight.shape[0]
    return [padding.empty(M, F, x), *(padding.empty(M if keep != "none" else 0, F, x) for _ in range(2)), *xas]


def _backward(dys, xs, tensors, xas, dxas, p, need_dx, needs, act, gated, factors, ys, tables=None, window=0):
    parts = unflatten(tensors)
    in_csrc = tables is None and _in_csrc(xs[0], parts, bool(act), p)
    if gains.are_in(parts):
        summed = [part for part, dxa in zip(parts, dxas, strict=True) if dxa is None and need_dx]
        if not (in_csrc and gains.are_for_csrc(xs[0], parts, summed)):
            return _backward_of_sums(dys, xs, parts, xas, dxas, p, need_dx, needs, act, gated, factors, ys)
    if in_csrc:
        grads = ops.cuda_lora_parts_backward(
            dys, xs, _for_kernels(*parts), xas, dxas, p, need_dx, needs, act, gated, factors, ys
        )
        return grads if act else _as_biases(grads, parts)
    segments = segmented.unflatten(tables, window, len(parts))
    if tables is not None and segmented.in_csrc(xs[0], parts, segments, bool(act)):
        if act:
            return segmented.csrc_backward_gated(dys, xs, parts, xas, act, gated, factors, segments)
        return segmented.csrc_backward(dys, xs, parts, xas, dxas, need_dx, needs, segments)
    if act:
        return _backward_gated(dys[0], parts[0], xas[0], p, act, gated, factors, segments[0])
    each = zip(dys, xs, parts, xas, dxas, segments, *columns(needs, len(parts)), strict=True)
    grads = [_backward_alone(dy, x, part, xa, dxa, p, of, need_dx, *own) for dy, x, part, xa, dxa, of, *own in each]
    dxs, dAs, dBs, dbiases, _ = zip(*grads, strict=True)
    dx, *others = [dx for dx, dxa in zip(dxs, dxas, strict=True) if dxa is None]
    for other in others:
        dx += other
    return [dx, *dAs, *dBs, *dbiases]


def _as_biases(grads: list[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """The gradients of biases in their dtypes, which kernels may not know."""
    first, last = 1 + 2 * len(parts), 1 + 3 * len(parts)
    dbiases = zip(grads[first:last], parts, strict=True)
    own = (dbias if part.bias is None else dbias.to(part.bias.dtype) for dbias, part in dbiases)
    return [*grads[:first], *own, *grads[last:]]


def _backward_of_sums(dys, xs, parts, xas, dxas, p, need_dx, needs, act, gated, factors, ys):
    """As if there were no gains, from gain dy. A gated pass sums nothing over tokens: the one behind it does that."""
    if act:
        (dy,), (part,) = dys, parts
        plain = flatten([part._replace(gain=None, bias=None)])
        return _backward([gains.times(dy, part.gain)], xs, plain, xas, dxas, p, need_dx, needs, act, gated, factors, [])
    needs, biases, count = list(needs), 1 + 2 * len(parts), len(parts)
    dsums, plain, found = list(dys), list(parts), {}  # gradients by their place among the results
    for i, (dy, part, y) in enumerate(zip(dys, parts, ys or [None] * count, strict=True)):
        if part.gain is None:
            continue
        need_dbias = needs[2 * count + i]
        plain[i] = part._replace(gain=None, bias=None)
        needs[2 * count + i], found[biases + i] = False, _empty_dbias(dy, part, 0)
        if y is None and not need_dbias:
            dsums[i] = gains.times(dy, part.gain)
            continue
        # Without y, dgain is of no use: something is read that is there.
        dsums[i], dgain, dbias = gains.backward(dy, dy if y is None else y, part, need_dbias)
        if need_dbias:
            found[biases + i] = dbias
        if y is not None:
            found[biases + count + i] = dgain
    grads = _backward(dsums, xs, flatten(plain), xas, dxas, p, need_dx, needs, [], [], False, [])
    grads += [dy.new_empty(0, dtype=checks.scale_dtype(dy)) for dy in dys if ys]
    return [found.get(i, grad) for i, grad in enumerate(grads)]


def _backward_gated(dy, part, xa, p, act, gated, factors, segments):
    """[dgate, dup, act(gate) up, dxa] of a part that reads act(gate) up; with the factors at hand without the third.

    As csrc makes it and as xa is, the op's dxa counts 1 / (1 - p) times, that of other backends once.
    """
    first, second = gated
    dhidden, *_, dxa = _backward_alone(dy, second, part, xa, None, p, segments, True, False, False, False)  # reads no x
    if segments is not None:
        dxa = segmented.dxa_of(dy, part, segments) if dxa is None else dxa
    else:
        dxa = reference.dxa_ref(dy, part.B, part.scale) if dxa is None else dxa
        dxa = _padded(dxa).mul_(0 if p == 1 else 1 / (1 - p))
    if factors:
        return [
            _padded(dhidden * second),
            _padded(dhidden * first),
            padding.empty(0, second.shape[1], second),
            dxa,
        ]
    dsides = reference.gated_backward(dhidden, first, second, *act)
    return [*map(_padded, dsides), _padded(reference.gated(first, second, *act)), dxa]


def _backward_alone(dy, x, part, xa, dxa, p, segments, need_dx, need_dA, need_dB, need_dbias):
    """(dx, dA, dB, dbias, dxa) of one part; what is not wanted is empty, dxa None where nothing wanted it."""
    weight, A, B, bias, scale, seed, _ = part
    needs = (need_dx and dxa is None, need_dA, need_dB)
    dxa = dxa * (1 - p) if p and dxa is not None else dxa
    dbias = None
    if not any(needs):
        grads = (None,) * 4
    elif segments is not None:
        grads = segmented.backward(dy, x, part, xa, dxa, needs, segments)
    elif (backend := _backend(x, part, p)) == "cuda":
        *grads, dbias = alone.csrc_backward(
            dy, x, weight, A, B, alone.kernel_bias(bias), xa, scale, seed, p, [*needs, need_dbias]
        )
        grads.append(dxa)  # its own stays there
    else:
        grads = alone.backward(backend, dy, x, weight, A, B, xa, scale, seed, dxa, p, needs)
    dx, dA, dB, dxa = grads
    if need_dbias and dbias is None:
        dbias = rows_of(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return (
        x.new_empty(0) if dx is None else dx,
        A.new_empty(0) if dA is None else dA,
        B.new_empty(0) if dB is None else dB,
        _empty_dbias(x, part, 0) if not need_dbias else dbias.to(bias.dtype),
        dxa,
    )


def _empty_dbias(x: Tensor, part: Part, size: int) -> Tensor:
    return x.new_empty(size, dtype=x.dtype if part.bias is None else part.bias.dtype)


def _empty_grads(each, of: Segments | None) -> tuple[Tensor, Tensor]:
    """dA and dB."""
    part, need_dA, need_dB, _ = each
    if of is not None:
        return segmented.empty_grads(part, of, need_dA, need_dB)
    return part.A.new_empty(part.A.shape if need_dA else 0), part.B.new_empty(part.B.shape if need_dB else 0)


def _backward_fake(dys, xs, tensors, xas, dxas, p, need_dx, needs, act, gated, factors, ys, tables=None, window=0):
    parts, x = unflatten(tensors), xs[0]
    if act:
        M, F = gated[0].shape
        rows = (M, M, 0 if factors else M)
        dxa = padding.empty(M, xas[0].shape[1], x) if tables is None else torch.empty_like(xas[0])
        return [*(padding.empty(each, F, x) for each in rows), dxa]
    each = list(zip(parts, *columns(needs, len(parts)), strict=True))
    dAs, dBs = zip(*map(_empty_grads, each, segmented.unflatten(tables, window, len(parts))), strict=True)
    return [
        x.new_empty(x.shape if need_dx else 0),
        *dAs,
        *dBs,
        *(_empty_dbias(x, part, part.weight.shape[0] if need else 0) for part, _, _, need in each),
        *(x.new_empty(0 if y is None else y.shape[-1], dtype=checks.scale_dtype(x)) for y in ys),
    ]


# parts is flat (parts.flatten); act is empty for plain parts. Parts whose rows have adapters of their own come with
# tables (segmented.py).
define(
    "lora_parts_forward(Tensor x, Tensor?[] parts, float p, float[] act, str keep, Tensor[]? tables=None, int window=0)"
    " -> Tensor[]",
    _forward,
    _forward_fake,
)
# A part with a dxa, made by a pass before, has no share in dx. Of a bias only the dtype is read where there is no gain.
# needs is of dAs, dBs and dbiases. ys is empty, or has the result of each part whose gain has a gradient, and dgains
# follow dbiases. With act there is one part, which reads act(gate) up: of it come dgate, dup, act(gate) up and dxa,
# from `gated`: gate and up, or their factors, where the third is empty.
define(
    "lora_parts_backward(Tensor[] dys, Tensor[] xs, Tensor?[] parts, Tensor[] xas, Tensor?[] dxas, float p,"
    " bool need_dx, bool[] needs, float[] act, Tensor[] gated, bool factors, Tensor?[] ys,"
    " Tensor[]? tables=None, int window=0) -> Tensor[]",
    _backward,
    _backward_fake,
)
