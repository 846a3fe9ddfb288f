"""LoRA linears that read one x, as one op: x is read once, and its gradient is summed where it is computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, checks
from .library import define
from .lora_linear import _autocast, _autocasts, _kernel_bias, _scale_on
from .lora_linear import _backward as _backward_alone
from .lora_linear import _forward as _forward_alone

ops = torch.ops.fused_lora
MOST_PARTS = 4  # of one launch


def obstacle(
    device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor]
) -> str | None:
    """Why linears that read one x of a dtype are not one launch, or None."""
    parts = list(zip(weights, As, Bs, strict=True))
    if len(parts) > MOST_PARTS:
        return f"they are more than {MOST_PARTS}"
    if any(weight.numel() == 0 for weight in weights) or all(A.numel() == 0 for A in As):
        return "there is nothing to compute"
    if any(A.dtype != As[0].dtype for A in As):
        return "their factors have dtypes of their own"
    with_factors = [(weight, A, B) for weight, A, B in parts if A.numel() > 0]
    ranks = tuple(A.shape[0] for _, A, _ in with_factors)
    return backends.together_obstacle(device, dtype, ranks, all(backends.csrc_reads(*part) for part in with_factors))


def _forward(x, weights, As, Bs, biases, scales, seed, p):
    if x.numel() > 0 and obstacle(x.device, x.dtype, weights, As, Bs) is None:
        biases = [_kernel_bias(bias) for bias in biases]
        ys, xas = ops.cuda_lora_group_forward(x, weights, As, Bs, biases, scales, seed, p)
        return [*ys, *(xa.contiguous() for xa in xas)]
    parts = zip(weights, As, Bs, biases, scales, strict=True)
    results = [_forward_alone(x, *part, seed, p) for part in parts]
    return [y for y, _ in results] + [xa for _, xa in results]


def _forward_fake(x, weights, As, Bs, biases, scales, seed, p):
    M = math.prod(x.shape[:-1])
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return ys + [x.new_empty((M, A.shape[0])) for A in As]


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of biases' gradients, until autograd gives them their biases' dtypes: lists of dtypes reach an op as numbers."""
    return torch.promote_types(x.dtype, torch.float32)


def _backward(dys, x, weights, As, Bs, xas, scales, seed, p, need_dx, need_dA, need_dB, need_dbias):
    if x.numel() > 0 and obstacle(x.device, x.dtype, weights, As, Bs) is None:
        wide = [wide_dtype(x)] * len(weights)
        dx, dAs, dBs, dbiases = ops.cuda_lora_group_backward(
            dys, x, weights, As, Bs, xas, scales, seed, p, need_dx, need_dA, need_dB, need_dbias, wide
        )
        return [dx, *dAs, *dBs, *dbiases]
    parts = zip(dys, weights, As, Bs, xas, scales, need_dA, need_dB, need_dbias, strict=True)
    grads = [
        _backward_part(dy, x, weight, A, B, xa, scale, seed, p, need_dx, *needs)
        for dy, weight, A, B, xa, scale, *needs in parts
    ]
    dxs, dAs, dBs, dbiases = zip(*grads, strict=True)
    dx = dxs[0]
    for other in dxs[1:]:
        dx += other
    return [dx, *dAs, *dBs, *dbiases]


def _backward_part(dy, x, weight, A, B, xa, scale, seed, p, need_dx, need_dA, need_dB, need_dbias):
    """Of one alone; what is not wanted is empty, in the dtype that it would have."""
    dbias_dtype = wide_dtype(x) if need_dbias else None
    dx, *grads = _backward_alone(dy, x, weight, A, B, xa, scale, seed, p, need_dx, need_dA, need_dB, dbias_dtype)
    wanted = zip(grads, (need_dA, need_dB, need_dbias), (A.dtype, B.dtype, wide_dtype(x)), strict=True)
    return dx, *(grad if need else x.new_empty(0, dtype=dtype) for grad, need, dtype in wanted)


def _backward_fake(dys, x, weights, As, Bs, xas, scales, seed, p, need_dx, need_dA, need_dB, need_dbias):
    def of(shape, need, dtype):
        return x.new_empty(shape if need else 0, dtype=dtype)

    return [
        of(x.shape, need_dx, x.dtype),
        *(of(A.shape, need, A.dtype) for A, need in zip(As, need_dA, strict=True)),
        *(of(B.shape, need, B.dtype) for B, need in zip(Bs, need_dB, strict=True)),
        *(of(weight.shape[:1], need, wide_dtype(x)) for weight, need in zip(weights, need_dbias, strict=True)),
    ]


define(
    "lora_group_forward(Tensor x, Tensor[] weights, Tensor[] As, Tensor[] Bs, Tensor?[] biases, Tensor[] scales,"
    " Tensor? seed, float p) -> Tensor[]",
    _forward,
    _forward_fake,
)
define(
    "lora_group_backward(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] As, Tensor[] Bs, Tensor[] xas,"
    " Tensor[] scales, Tensor? seed, float p, bool need_dx, bool[] need_dA, bool[] need_dB, bool[] need_dbias)"
    " -> Tensor[]",
    _backward,
    _backward_fake,
)


class LoRAGroupFunction(torch.autograd.Function):
    """As LoRALinearFunction, with the tensors of all parts one after another: weights, As, Bs, biases, scales."""

    @staticmethod
    def forward(ctx, x, seed, p, parts, *tensors):
        weights, As, Bs, biases, scales = _columns(tensors, parts)
        ys_and_xas = ops.lora_group_forward(x, weights, As, Bs, biases, scales, seed, p)
        ys, xas = ys_and_xas[:parts], ys_and_xas[parts:]
        ctx.save_for_backward(x, seed, *weights, *As, *Bs, *xas, *scales)
        ctx.p, ctx.parts = p, parts
        ctx.bias_dtypes = [x.dtype if bias is None else bias.dtype for bias in biases]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        parts = ctx.parts
        x, seed, *saved = ctx.saved_tensors
        weights, As, Bs, xas, scales = _columns(saved, parts)
        need_dx, _, _, _, *needs = ctx.needs_input_grad
        if not any(ctx.needs_input_grad):
            return (None,) * (4 + 5 * parts)
        _, need_dA, need_dB, need_dbias, _ = _columns(needs, parts)
        dx, *grads = ops.lora_group_backward(
            list(dys), x, weights, As, Bs, xas, scales, seed, ctx.p, need_dx, need_dA, need_dB, need_dbias
        )
        grads = _of_parts(grads, [*need_dA, *need_dB, *need_dbias], ctx.bias_dtypes)
        nothing = [None] * parts
        return dx if need_dx else None, None, None, None, *nothing, *grads, *nothing


def _of_parts(grads: list[Tensor], wanted: list[bool], bias_dtypes: list[torch.dtype]) -> list[Tensor | None]:
    """Gradients of As, Bs and biases as autograd takes them."""
    factors = len(grads) - len(bias_dtypes)
    dbiases = [grad.to(dtype) for grad, dtype in zip(grads[factors:], bias_dtypes, strict=True)]
    return [grad if need else None for grad, need in zip([*grads[:factors], *dbiases], wanted, strict=True)]


def _columns(tensors: Sequence, parts: int) -> list[list]:
    return [list(tensors[i : i + parts]) for i in range(0, len(tensors), parts)]


def lora_group(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float | Tensor] | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(lora_linear(x, weight, A, B, bias, scale, p, seed) for each part): q, k and v, or gate and up.

        x (..., K)   weights (N_i, K)   As (r_i, K)   Bs (N_i, r_i)   biases (N_i,) or None   ->   ys (..., N_i)

    All as in lora_linear; r_i = 0 is a part without factors, and all parts that have any drop the same entries of x. On
    Hopper forward and backward are one launch each for up to four parts, and dx is summed in its tiles.

    Raises ValueError or TypeError naming the part and the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    parts = len(weights)
    biases = [None] * parts if biases is None else list(biases)
    scales = [1.0] * parts if scales is None else list(scales)
    for name, given in (("As", As), ("Bs", Bs), ("biases", biases), ("scales", scales)):
        if len(given) != parts:
            raise ValueError(f"{name} must have an entry for each of the {parts} weights, got {len(given)}")
    if parts == 0:
        raise ValueError("weights must have at least one entry")
    if _autocasts(x):
        cast = [_autocast(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        x, weights, biases = cast[0][0], [weight for _, weight, _ in cast], [bias for _, _, bias in cast]
    for weight, A, B, bias, scale in zip(weights, As, Bs, biases, scales, strict=True):
        if A.shape[:1] == (0,):  # a part without factors is checked as one with some
            if B.shape[1:] != (0,):
                raise ValueError(f"B must have 0 columns to match A {tuple(A.shape)}, got {tuple(B.shape)}")
            A, B = A.new_empty(1, *A.shape[1:]), B.new_empty(*B.shape[:1], 1)
        checks.check_lora_linear(x, weight, A, B, bias, scale, p, seed)
    scales = [_scale_on(x.device, scale) for scale in scales]
    if p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    return LoRAGroupFunction.apply(x, seed, p, parts, *weights, *As, *Bs, *biases, *scales)
