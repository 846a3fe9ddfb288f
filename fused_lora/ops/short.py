"""The short way of single linears on a GPU to Triton's kernels, to torch's products, and to csrc's where it has no
autograd in C++: a call of tensors like those of a call that was looked at before is neither checked nor asked about
again, and needs no dispatcher but csrc's own ops.

The long way takes the host ten times what torch takes for a linear. It is left to those who watch ops (torch.compile, a
profiler, a mode, a transformation) and to what is rare.
"""

import torch
from torch import Tensor, nn

from .. import backends, checks, choices
from ..layout import layout_of
from ..recent import Recent
from . import alone, autograd
from .parts import Part, drawn_seed, flatten

MOST_KINDS = 4096  # of calls
SHORT = ("triton", "addmm")  # and csrc without an autograd of its own

_looked_at = Recent(MOST_KINDS)


def lora_linear(x, weight, A, B, bias, scale, p, seed) -> Tensor | None:
    """y of a call that is for these backends; None: the long way. Raises what checks.check_lora_linear does."""
    if _is_watched() or not isinstance(x, Tensor) or not x.is_cuda or type(p) not in (int, float):
        return None
    tensors = (x, weight, A, B, bias, scale, seed)
    kind = _kind_of(tensors, p)
    backend = kind and _looked_at.get(kind, lambda: _look_at(*tensors, p))
    if not backend:
        return None
    seed = drawn_seed(x, p, seed)
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _apply(x, weight, A, B, bias, scale, (backend, seed, p, kind))
    return alone.forward(backend, x, weight, A, B, bias, scale, seed, p, kind)[0]


def _kind_of(tensors: tuple, p) -> tuple | None:
    """All that decides how a call is computed; None where there may be more to it."""
    x = tensors[0]
    device = x.device
    kind = [p, type(p), device, backends.precision(x.dtype), choices.changes()]
    kind += backends.forced_backend(), backends.autotune_enabled()
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
        elif _is_plain(tensor) and tensor.device == device:
            kind.append((layout_of(tensor), tensor.requires_grad))
        else:
            return None
    return tuple(kind)


def _is_plain(tensor) -> bool:
    """Whether its memory holds its values, and is here."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_neg():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # one that has leaked out of torch.func


def _is_watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or autograd.watched()
    )


def _look_at(x, weight, A, B, bias, scale, seed, p) -> str:
    """The backend of a call that is right; none for what goes the long way."""
    checks.check_lora_linear(x, weight, A, B, bias, scale, p, seed)
    is_rare = 0 in (x.numel(), weight.numel(), A.numel()) or weight.requires_grad or p == 1
    if bias is not None:
        is_rare |= bias.requires_grad or bias.dtype is torch.float64 or not bias.is_contiguous()
    if is_rare:
        return ""
    (N, K), M = weight.shape, x.numel() // x.shape[-1]
    readable = choices.csrc_reads(weight, A, B)
    name = choices.choose_lora_linear(x.device, x.dtype, A.shape[0], readable, M, N, K, p).name
    return name if name in SHORT or (name == "cuda" and backends.eager_extension() is None) else ""


class LoRALinearFunction(torch.autograd.Function):
    """As autograd.LoRAPartsFunction, of one part whose bias is frozen. What is no tensor comes as one argument."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, scale, call):
        backend, seed, p, kind = call
        y, xa = alone.forward(backend, x, weight, A, B, bias, scale, seed, p, kind)
        ctx.save_for_backward(x, xa, weight, A, B, scale, seed)
        ctx.call = backend, p
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 7
        x, xa, weight, A, B, scale, seed = ctx.saved_tensors
        need_dx, _, need_dA, need_dB, *_ = ctx.needs_input_grad
        backend, p = ctx.call
        if autograd.needs_formula([dy]):
            part, needs = Part(weight, A, B, None, scale, seed), flatten([Part(False, need_dA, need_dB, scale=False)])
            formula = lambda x, parts: autograd.linears(x, parts, p)  # noqa: E731
            dx, _, _, dA, dB, *_ = autograd.by_formula(formula, [dy], x, [part], need_dx, needs)
        else:
            dy, x, xa = dy.resolve_neg(), x.resolve_neg(), xa.resolve_neg()  # kernels read memory
            tensors, needs = (dy, x, weight, A, B, xa, scale, seed, None), (need_dx, need_dA, need_dB)
            dx, dA, dB, _ = alone.backward(backend, *tensors, p, needs, keeps_dxa=False)
        return dx, None, dA, dB, None, None, None


# Function.apply's own end: what it does before is for transformations of torch.func, who are watched for.
_apply = super(torch.autograd.Function, LoRALinearFunction).apply
