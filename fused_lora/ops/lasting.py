"""What a backward pass reads and no hook for saved tensors need see: trained factors, which their graph holds anyway to
add their gradients up, and scales.

A checkpoint's hooks take the host 10 us a tensor, and these are half of what a linear saves: 588 of 2,016 tensors in a
step of Qwen3-0.6B. csrc/torch/eager_saved.cpp leaves out the same: a checkpoint, which counts what is saved, may go by
the one way first and by the other then.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .parts import Part, flatten


def save(ctx, tensors: Sequence[Tensor | None], parts: Sequence[Part]) -> None:
    """ctx.save_for_backward of tensors and then of parts, which saved gives back."""
    tensors = [*tensors, *flatten(parts)]
    first = len(tensors) - len(parts) * len(Part._fields)
    ctx.lasting = dict(_lasting(parts, first)) if _has_hooks() else {}
    if ctx.lasting:
        ctx.versions = _versions(ctx.lasting)
        tensors = [None if i in ctx.lasting else tensor for i, tensor in enumerate(tensors)]
    ctx.save_for_backward(*tensors)


def saved(ctx) -> Sequence[Tensor | None]:
    """Raises RuntimeError where one was changed in place since, as ctx.saved_tensors does."""
    if not ctx.lasting:
        return ctx.saved_tensors
    if _versions(ctx.lasting) != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            "A, B or scale of a LoRA linear"
        )
    return [ctx.lasting.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


def _has_hooks() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _lasting(parts: Sequence[Part], first: int):
    """Places and tensors; the first part's begin at `first`."""
    for part in parts:
        for i, tensor in enumerate(part, first):
            if (tensor is part.A or tensor is part.B or tensor is part.scale) and _lasts(tensor):
                yield i, tensor
        first += len(part)


def _lasts(tensor: Tensor) -> bool:
    return tensor.is_leaf and not tensor.is_inference() and (tensor.requires_grad or tensor.dim() == 0)


def _versions(lasting: dict[int, Tensor]) -> int:
    """They only grow."""
    return sum(tensor._version for tensor in lasting.values())
