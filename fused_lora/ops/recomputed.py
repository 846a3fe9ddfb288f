"""Passes that a checkpoint computes again, whose results nobody may want.

torch.utils.checkpoint stops once everything that was saved is there again. A linear of torch's saves before it
computes: of the last one in a block, which the block's gradients do not need, the product is never made. A Function
saves after its forward. So what a pass saves is made here first, by a Function whose result is a stand-in without
memory; the result itself comes after it, if it comes to that. A LLaMA's down projection is a quarter of a block's
forward pass.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import Stored, dequantise
from .library import ops
from .parts import Part, flatten

FEW = 8  # columns of y, in a pass that is about xa
# Of a product that is worth it: by way of Python a pass takes the host a quarter of a millisecond longer. With the
# smaller ones of Qwen3-0.6B, 8192 tokens on an H200, checkpointed steps took 1.24 times as long.
LEAST_FLOPS = 2e11


def is_worth(x: Tensor, weight: Tensor | Stored) -> bool:
    """Whether a checkpoint computes again, and may stop before a product of x's rows with a weight."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or "_recomputation_hook" not in getattr(hooks[0], "__qualname__", ""):
        return False
    return 2 * math.prod(x.shape[:-1]) * weight.numel() >= LEAST_FLOPS


def stand_in_and_low(x: Tensor, part: Part, p: float) -> tuple[Tensor, Tensor]:
    """(something of y's shape, xa)."""
    weight = part.weight
    few = dequantise(weight, x.dtype, 0, min(FEW, weight.N)) if isinstance(weight, Stored) else weight[:FEW]
    narrow = part._replace(weight=few, B=part.B[:FEW], bias=None)
    _, xa = ops.lora_parts_forward(x, flatten([narrow]), p, [], "none")
    return x.new_empty(()).expand(*x.shape[:-1], weight.shape[0]), xa


def result(stand_in: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """make(), with the stand-in's place in the graph."""
    return _Result.apply(stand_in, make)


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stand_in, make):
        return make()

    @staticmethod
    def backward(ctx, dy):
        return dy, None
