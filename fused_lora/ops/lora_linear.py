"""The LoRA linear as ops and as an autograd Function: saves tensors, asks backends, nothing more."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, checks, reference
from .library import define, launching

ops = torch.ops.fused_lora


def _backend(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> str:
    if x.numel() == 0 or weight.numel() == 0 or A.numel() == 0:
        return "reference"  # empty products have no tiles; the reference gets them right for free
    return backends.choose_lora_linear(x.device, x.dtype, A.shape[0], backends.csrc_reads(weight, A, B)).name


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K); reshape(-1, K) would not know M where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _kernel_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Of a bias: kernels know three dtypes."""
    return torch.float32 if dtype is torch.float64 else dtype


def _kernel_bias(bias: Tensor | None) -> Tensor | None:
    """Dense, as kernels read it, and of a dtype that they know."""
    return bias if bias is None else bias.to(_kernel_dtype(bias.dtype)).contiguous()


def _forward(x, weight, A, B, bias, scale, seed, p):
    flat, backend = _rows(x), _backend(x, weight, A, B)
    if backend == "cuda":
        y, xa = ops.cuda_lora_linear_forward(flat, weight, A, B, _kernel_bias(bias), scale, seed, p)
        xa = xa.contiguous()
    elif backend == "triton":
        from ..kernels.dropout import Dropout
        from ..kernels.lora_linear import lora_linear_forward

        with launching("forward", x):
            gpu, precision = backends.gpu(x.device), backends.precision(x.dtype)
            dropout = Dropout(p, seed)
            y, xa = lora_linear_forward(flat, weight, A, B, _kernel_bias(bias), scale, dropout, gpu, precision)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y, xa = reference.lora_linear_forward_ref(flat, weight, A, B, bias, scale, seed, p)
    return y.view(*x.shape[:-1], weight.shape[0]), xa


def _forward_fake(x, weight, A, B, bias, scale, seed, p):
    xa = x.new_empty((math.prod(x.shape[:-1]), A.shape[0]))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), xa


def _backward(dy, x, weight, A, B, xa, scale, seed, p, need_dx, need_dA, need_dB, dbias_dtype):
    needs = (need_dx, need_dA, need_dB)
    flat, flat_dy, backend = _rows(x), _rows(dy), _backend(x, weight, A, B)
    dbias = None
    if not any(needs) and (backend != "cuda" or dbias_dtype is None):
        grads = (None,) * 3
    elif backend == "cuda":
        *grads, dbias = ops.cuda_lora_linear_backward(
            flat_dy, flat, weight, A, B, xa, scale, seed, p, *needs, _kernel_dtype(dbias_dtype)
        )
    elif backend == "triton":
        from ..kernels.dropout import Dropout
        from ..kernels.lora_linear import lora_linear_backward

        with launching("backward", x):
            gpu, precision = backends.gpu(x.device), backends.precision(x.dtype)
            grads = lora_linear_backward(
                flat_dy, flat, weight, A, B, xa, scale, Dropout(p, seed), gpu, precision, needs
            )
    else:
        with torch.autocast(x.device.type, enabled=False):
            grads = reference.lora_linear_backward_ref(flat_dy, flat, weight, A, B, xa, scale, seed, p, needs)
    dx, dA, dB = (grad if need else x.new_empty(0) for grad, need in zip(grads, needs, strict=True))
    if dbias_dtype is None:
        dbias = x.new_empty(0)
    else:
        if dbias is None:
            dbias = flat_dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        dbias = dbias.to(dbias_dtype)
    return dx.view(x.shape) if need_dx else dx, dA, dB, dbias


def _backward_fake(dy, x, weight, A, B, xa, scale, seed, p, need_dx, need_dA, need_dB, dbias_dtype):
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    dA = A.new_empty(A.shape) if need_dA else x.new_empty(0)
    dB = B.new_empty(B.shape) if need_dB else x.new_empty(0)
    dbias = x.new_empty(0) if dbias_dtype is None else x.new_empty(weight.shape[0], dtype=dbias_dtype)
    return dx, dA, dB, dbias


define(
    "lora_linear_forward(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, Tensor scale, Tensor? seed,"
    " float p) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor xa, Tensor scale,"
    " Tensor? seed, float p, bool need_dx, bool need_dA, bool need_dB, ScalarType? dbias_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class LoRALinearFunction(torch.autograd.Function):
    """An autograd.Function outside and a plain op inside: the cheapest wrapper that torch.compile sees through."""

    @staticmethod
    def forward(ctx, x, weight, A, B, bias, scale, seed, p):
        y, xa = ops.lora_linear_forward(x, weight, A, B, bias, scale, seed, p)
        ctx.save_for_backward(x, weight, A, B, xa, scale, seed)
        ctx.p = p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B, xa, scale, seed = ctx.saved_tensors
        need_dx, _, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:5]
        needs = (need_dx, need_dA, need_dB, need_dbias)
        if not any(needs):
            return (None,) * 8
        grads = ops.lora_linear_backward(
            dy, x, weight, A, B, xa, scale, seed, ctx.p, *needs[:3], ctx.bias_dtype if need_dbias else None
        )
        dx, dA, dB, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return dx, None, dA, dB, dbias, None, None, None


def _scale_on(device: torch.device, scale: float | Tensor) -> Tensor:
    """By a fill, which a CUDA graph can hold; a copy from the host it cannot."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=device)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type  # of which `meta` knows no autocast
    return kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None):
    """As torch.nn.functional.linear: activations, weight and bias in autocast's dtype. A and B keep theirs."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def _in_csrc(x, weight, A, B, bias, scale, seed, p) -> Tensor | None:
    """y by csrc's autograd, if the call is one of plain tensors, outside torch.compile, that csrc's kernels take."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_cuda:
        return None
    eager = backends.eager_lora_linear()
    if eager is None:
        return None
    for tensor in (weight, A, B, scale):
        if not isinstance(tensor, Tensor):
            return None
    for tensor in (bias, seed):
        if tensor is not None and not isinstance(tensor, Tensor):
            return None
    if type(p) is not float and not (type(p) is int and 0 <= p <= 1):
        return None
    return eager(x, weight, A, B, bias, scale, seed, p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scale dropout(x) A^T B^T + bias, fp32 accumulation, one rounding.

        x (..., K) bf16 | fp16 | fp32 | fp64, any strides   weight (N, K) in x's dtype, frozen   bias (N,) or None
        A (r, K), B (N, r) in any floating dtype, 1 <= r <= 512; computed in x's dtype   ->   y (..., N) in x's dtype

    scale is lora_alpha / r: a float, or a 0-dim float32 tensor on x's device, with which a new value costs nothing
    (no fill, no recompilation). p is the probability of dropping an entry of x on its way to A; its mask is a hash
    of (seed, row, column), seed a 0-dim int64 tensor, drawn from torch's generator when None. Pass p=0 to evaluate.

    Gradients: dxa = scale dy B, dx = dy W + mask(dxa A) / (1 - p), dA = dxa^T dropout(x), dB = dy^T xa, in the
    dtypes of x, A and B, and that of bias. Differentiable once. Saves x and xa = scale dropout(x) A^T (M, r).

    Raises ValueError or TypeError naming the argument for a shape, dtype or device; weight.requires_grad is one.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    if isinstance(x, Tensor) and _autocasts(x):
        x, weight, bias = _autocast(x, weight, bias)
    y = _in_csrc(x, weight, A, B, bias, scale, seed, p)
    if y is not None:  # else something is wrong, or for another backend
        return y
    checks.check_lora_linear(x, weight, A, B, bias, scale, p, seed)
    scale = _scale_on(x.device, scale)
    if p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    differentiable = (x, A, B) if bias is None else (x, A, B, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        return LoRALinearFunction.apply(x, weight, A, B, bias, scale, seed, p)
    return ops.lora_linear_forward(x, weight, A, B, bias, scale, seed, p)[0]
