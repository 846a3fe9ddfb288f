"""The gated MLP of LoRA linears as one op: act(gate) up is made and differentiated where its factors are computed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, checks, padding, reference
from .library import define
from .lora_group import _backward as _group_backward
from .lora_group import _backward_fake as _group_backward_fake
from .lora_group import _backward_part, _columns, _of_parts, wide_dtype
from .lora_group import _forward as _group_forward
from .lora_group import obstacle as group_obstacle
from .lora_linear import _autocast, _autocasts, _kernel_bias, _rows, _scale_on

ops = torch.ops.fused_lora
SAVE = ("all", "less")
PARTS = ("gate", "up", "down")


def obstacle(
    device: torch.device, dtype: torch.dtype, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor]
) -> str | None:
    """Why the passes of gate, up and down are not fused for an x of a dtype, or None."""
    found = group_obstacle(device, dtype, weights, As, Bs)
    return found or backends.gated_obstacle(tuple(A.shape[0] for A in As))


def _forward(x, weights, As, Bs, biases, scales, seed, p, linear, cubic, keep, factors):
    flat = _rows(x)
    if x.numel() > 0 and obstacle(x.device, x.dtype, weights, As, Bs) is None:
        biases = [_kernel_bias(bias) for bias in biases]
        hidden, gate, up, *xas = ops.cuda_lora_gated_forward(
            flat, weights, As, Bs, biases, scales, seed, p, linear, cubic, keep, factors
        )
        return hidden, gate, up, *(xa.contiguous() for xa in xas)
    gate, up, *xas = _group_forward(flat, weights, As, Bs, biases, scales, seed, p)
    shape = gate.shape
    hidden = padding.empty(*shape, x).copy_(reference.gated(gate, up, linear, cubic))
    kept = reference.gated_factors(gate, up, linear, cubic) if factors else (gate, up)
    kept = [padding.empty(*shape, x).copy_(y) if keep else padding.empty(0, shape[1], x) for y in kept]
    return hidden, *kept, *xas


def _forward_fake(x, weights, As, Bs, biases, scales, seed, p, linear, cubic, keep, factors):
    M, F = _rows(x).shape[0], weights[0].shape[0]
    kept = [padding.empty(M if keep else 0, F, x) for _ in range(2)]
    return padding.empty(M, F, x), *kept, *(x.new_empty((M, A.shape[0])) for A in As)


# gate and up, or where hidden was kept the factors that the gradient of hidden is multiplied by.
def _backward(
    dy, x, hidden, gate, up, weights, As, Bs, xas, scales, seed, down_seed, p, need_dx, need_dA, need_dB, need_dbias,
    linear, cubic,
):  # fmt: skip
    dy, flat = _rows(dy), _rows(x)
    if x.numel() > 0 and obstacle(x.device, x.dtype, weights, As, Bs) is None:
        dx, dAs, dBs, dbiases = ops.cuda_lora_mlp_backward(
            dy, flat, hidden, gate, up, weights, As, Bs, xas, scales, seed, down_seed, p, need_dx, need_dA, need_dB,
            need_dbias, [wide_dtype(x)] * len(PARTS), linear, cubic,
        )  # fmt: skip
        return [dx.view(x.shape) if need_dx else dx, *dAs, *dBs, *dbiases]
    down_x = reference.gated(gate, up, linear, cubic) if hidden is None else hidden
    dhidden, *of_down = _backward_part(
        dy, down_x, weights[2], As[2], Bs[2], xas[2], scales[2], down_seed, p, True, need_dA[2], need_dB[2],
        need_dbias[2],
    )  # fmt: skip
    if hidden is None:
        dsides = reference.gated_backward(dhidden, gate, up, linear, cubic)
    else:
        dsides = dhidden * up, dhidden * gate
    dx, *of_sides = _group_backward(
        dsides, flat, weights[:2], As[:2], Bs[:2], xas[:2], scales[:2], seed, p, need_dx, need_dA[:2], need_dB[:2],
        need_dbias[:2],
    )  # fmt: skip
    grads = [grad for i in range(3) for grad in (*of_sides[2 * i : 2 * i + 2], of_down[i])]
    return [dx.view(x.shape) if need_dx else dx, *grads]


def _backward_fake(
    dy, x, hidden, gate, up, weights, As, Bs, xas, scales, seed, down_seed, p, need_dx, need_dA, need_dB, need_dbias,
    linear, cubic,
):  # fmt: skip
    return _group_backward_fake(
        [dy] * 3, x, weights, As, Bs, xas, scales, seed, p, need_dx, need_dA, need_dB, need_dbias
    )


define(
    "lora_gated_forward(Tensor x, Tensor[] weights, Tensor[] As, Tensor[] Bs, Tensor?[] biases, Tensor[] scales,"
    " Tensor? seed, float p, float linear, float cubic, bool keep, bool factors)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor? hidden, Tensor gate, Tensor up, Tensor[] weights, Tensor[] As,"
    " Tensor[] Bs, Tensor[] xas, Tensor[] scales, Tensor? seed, Tensor? down_seed, float p, bool need_dx,"
    " bool[] need_dA, bool[] need_dB, bool[] need_dbias, float linear, float cubic) -> Tensor[]",
    _backward,
    _backward_fake,
)


class LoRAMLPFunction(torch.autograd.Function):
    """Tensors of gate, up and down one after another: weights, As, Bs, biases, scales."""

    @staticmethod
    def forward(ctx, x, seed, down_seed, p, act, save, *tensors):
        weights, As, Bs, biases, scales = _columns(tensors, len(PARTS))
        hidden, gate, up, *xas = ops.lora_gated_forward(
            x, weights[:2], As[:2], Bs[:2], biases[:2], scales[:2], seed, p, *act, True, save == "all"
        )
        down = (weights[2], As[2], Bs[2], biases[2], scales[2])
        y, xa = ops.lora_linear_forward(hidden, *down, down_seed, p)
        kept = hidden if save == "all" else None
        ctx.save_for_backward(x, seed, down_seed, gate, up, kept, *weights, *As, *Bs, *xas, xa, *scales)
        ctx.p, ctx.act = p, act
        ctx.bias_dtypes = [x.dtype if bias is None else bias.dtype for bias in biases]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, seed, down_seed, gate, up, hidden, *saved = ctx.saved_tensors
        weights, As, Bs, xas, scales = _columns(saved, len(PARTS))
        need_dx, *_ = ctx.needs_input_grad
        _, need_dA, need_dB, need_dbias, _ = _columns(ctx.needs_input_grad[6:], len(PARTS))
        if not any(ctx.needs_input_grad):
            return (None,) * 21
        dx, *grads = ops.lora_mlp_backward(
            dy, x, hidden, gate, up, weights, As, Bs, xas, scales, seed, down_seed, ctx.p, need_dx, need_dA, need_dB,
            need_dbias, *ctx.act,
        )  # fmt: skip
        grads = _of_parts(grads, [*need_dA, *need_dB, *need_dbias], ctx.bias_dtypes)
        nothing = [None] * len(PARTS)
        return dx if need_dx else None, *[None] * 5, *nothing, *grads, *nothing


def lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float | Tensor] | None = None,
    activation: str = "silu",
    p: float = 0.0,
    seed: Tensor | None = None,
    save: str = "all",
) -> Tensor:
    """y = down(act(gate(x)) up(x)), all three of them lora_linear; every sequence is of gate's, up's and down's.

        x (..., K)   weights (F, K), (F, K), (N, F)   As (r_i, K), (r_i, K), (r, F)   Bs (F, r_i), (F, r_i), (N, r)
        biases (F,), (F,), (N,) or None   ->   y (..., N)

    activation is "silu" or "gelu_tanh". All else as in lora_linear; gate and up drop the same entries of x (seed), down
    those of its own input (seed + 2^32). On Hopper, for ranks up to 128, the product act(gate) up is made in the launch
    that computes gate and up, and its gradient becomes theirs in the launch that computes it, without being stored.

    Saves x, the product, and what its gradient is to be multiplied by: act(gate(x)) and act'(gate(x)) up(x). With
    save="less" it saves x, gate(x) and up(x), and the backward pass computes the others again.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. Gated MLPs: Shazeer 2020, arXiv:2002.05202.
    """
    parts = len(PARTS)
    biases = [None] * parts if biases is None else list(biases)
    scales = [1.0] * parts if scales is None else list(scales)
    columns = {"weights": weights, "As": As, "Bs": Bs, "biases": biases, "scales": scales}
    for name, given in columns.items():
        if len(given) != parts:
            raise ValueError(f"{name} must have entries for gate, up and down, got {len(given)}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if save not in SAVE:
        raise ValueError(f"save must be one of {', '.join(SAVE)}, got {save!r}")
    if _autocasts(x):
        cast = [_autocast(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        x, weights, biases = cast[0][0], [weight for _, weight, _ in cast], [bias for _, _, bias in cast]
    checks.check_lora_mlp(x, weights, As, Bs, biases, scales, p, seed)
    scales = [_scale_on(x.device, scale) for scale in scales]
    if p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    down_seed = None if seed is None else seed + reference.DOWN_SEED
    act = reference.ACTIVATIONS[activation]
    tensors = (x, *As, *Bs, *(bias for bias in biases if bias is not None))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return LoRAMLPFunction.apply(x, seed, down_seed, p, act, save, *weights, *As, *Bs, *biases, *scales)
    hidden, *_ = ops.lora_gated_forward(
        x, weights[:2], As[:2], Bs[:2], biases[:2], scales[:2], seed, p, *act, False, False
    )
    y, _ = ops.lora_linear_forward(hidden, weights[2], As[2], Bs[2], biases[2], scales[2], down_seed, p)
    return y.view(*x.shape[:-1], y.shape[-1])
