"""One part by itself, forward and backward, by any backend.

x (..., K), dy (..., N) and what is shaped like them in their own sizes, xa and dxa (M, r).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from .. import addmm, backends, reference
from ..formats import Stored
from .library import launching, ops
from .parts import Part, flatten


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (M, K); reshape(-1, K) would not know M where K is 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows in the leading sizes of x, and no view, which could not be changed in place behind a Function."""
    if x.dim() == 2:
        return rows
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])


def kernel_bias(bias: Tensor | None) -> Tensor | None:
    """Dense, as kernels read it, and of a dtype that they know."""
    if bias is None or (bias.dtype is not torch.float64 and bias.is_contiguous()):
        return bias
    return bias.to(torch.float32 if bias.dtype is torch.float64 else bias.dtype).contiguous()


def in_triton(tensor: Tensor) -> bool:
    """Whether a pass that Triton alone has a kernel for runs by it."""
    return (
        tensor.numel() > 0
        and backends.forced_backend() != "reference"
        and backends.triton_obstacle(tensor.device, tensor.dtype) is None
    )


@cache
def _triton(stored: bool):
    """Imported where it is used: not everybody has Triton. A call's own import statement would take it 3 us."""
    from ..kernels import lora_linear, replay

    if stored:
        return lora_linear.stored_forward_pass, lora_linear.stored_backward_pass, replay.replayed
    return lora_linear.forward_pass, lora_linear.backward_pass, replay.replayed


def _tensors(weight: Tensor | Stored) -> tuple[Tensor | None, ...]:
    """As inputs of those passes."""
    return weight.tensors if isinstance(weight, Stored) else (weight,)


def forward(backend: str, x, weight, A, B, bias, scale, seed, p: float, kind: tuple | None = None, gain=None):
    """(y, xa); csrc's xa has padded rows. kind: all that decides how the call is computed, if that is known."""
    if backend == "cuda":
        flat = flatten([Part(weight, A, B, kernel_bias(bias), scale, seed, gain)])
        return ops.cuda_lora_parts_forward(x, flat, p, [], "none")
    rows = rows_of(x)
    if backend == "triton":
        forward_pass, _, replayed = _triton(isinstance(weight, Stored))
        with launching("forward", x):
            inputs = rows, *_tensors(weight), A, B, kernel_bias(bias), scale, seed, gain
            return replayed(forward_pass, inputs, lambda: (p, *_triton_constants(x)), kind)
    own = addmm.lora_linear_forward if backend == "addmm" else reference.lora_linear_forward_ref
    with no_autocast(x):
        y, xa = own(rows, weight, A, B, bias, scale, seed, p, gain)
    return like(y, x), xa


def backward(backend: str, dy, x, weight, A, B, xa, scale, seed, dxa, p: float, needs, keeps_dxa=True):
    """(dx, dA, dB, dxa), None where needs, of the first three, says so. A dxa that is given is not made."""
    if backend == "cuda":  # whose own dxa stays there
        dx, dA, dB, _ = csrc_backward(dy, x, weight, A, B, None, xa, scale, seed, p, [*needs, False])
        return dx, dA, dB, dxa
    rows_dy, rows = rows_of(dy), rows_of(x)
    if backend == "triton":
        _, backward_pass, replayed = _triton(isinstance(weight, Stored))
        with launching("backward", x):
            inputs = rows_dy, rows, *_tensors(weight), A, B, xa, scale, seed, dxa
            *grads, made = replayed(backward_pass, inputs, lambda: (p, *_triton_constants(x), needs, keeps_dxa))
        return *grads, dxa if made is None else made
    own = addmm.lora_linear_backward if backend == "addmm" else reference.lora_linear_backward_ref
    with no_autocast(x):
        dx, *grads = own(rows_dy, rows, weight, A, B, xa, scale, seed, p, needs, dxa)
    return None if dx is None else like(dx, x), *grads


def csrc_backward(dy, x, weight, A, B, bias, xa, scale, seed, p: float, needs: Sequence[bool]):
    """(dx, dA, dB, dbias), None where needs says so."""
    flat, (need_dx, *others) = flatten([Part(weight, A, B, bias, scale, seed)]), needs
    grads = ops.cuda_lora_parts_backward([dy], [x], flat, [xa], [None], p, need_dx, others, [], [], False, [])
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _triton_constants(x: Tensor) -> tuple:
    return backends.gpu(x.device), backends.precision(x.dtype), x.shape[:-1]


def no_autocast(x: Tensor):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
