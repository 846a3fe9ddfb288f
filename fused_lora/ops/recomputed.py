"""Passes that a checkpoint computes again, whose results nobody may want.

torch.utils.checkpoint stops once everything that was saved is there again. A linear of torch's saves before it
computes: of the last one in a block, which the block's gradients do not need, the product is never made. A Function
saves after its forward. So what a pass saves is made here first, by a Function whose result is a stand-in without
memory; the result itself comes after it, if it comes to that. A LLaMA's down projection is a quarter of a block's
forward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .library import ops
from .parts import Part, flatten

FEW = 8  # columns of y, in a pass that is about xa


def is_running(parts: Sequence[Part]) -> bool:
    """Whether a checkpoint computes again, and may stop before the results of these parts. Those of gains are saved."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or "_recomputation_hook" not in getattr(hooks[0], "__qualname__", ""):
        return False
    return all(part.gain is None for part in parts)


def stand_in_and_low(x: Tensor, part: Part, p: float) -> tuple[Tensor, Tensor]:
    """(something of y's shape, xa)."""
    narrow = part._replace(weight=part.weight[:FEW], B=part.B[:FEW], bias=None)
    _, xa = ops.lora_parts_forward(x, flatten([narrow]), p, [], "none")
    return x.new_empty(()).expand(*x.shape[:-1], len(part.weight)), xa


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
