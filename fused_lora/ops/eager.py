"""Calls of plain tensors on a GPU, outside torch.compile, go straight to csrc, which has an autograd of its own in C++:
by way of this package's Python a call takes the host three times as long. What is not for it, or not right, comes back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..reference import DOWN_SEED
from .parts import Part, flatten


def csrc():
    """The extension, whose functions give None for calls that are not for them; None without it."""
    return None if torch.compiler.is_compiling() else backends.eager_extension()


def is_probability(p) -> bool:
    return type(p) is float or (type(p) is int and 0 <= p <= 1)


def are_plain(x, parts: Sequence[Part], seed: Tensor | None, p: float) -> bool:
    """Whether csrc can be handed the arguments at all, to look at them itself."""
    if not isinstance(x, Tensor) or not x.is_cuda or not is_probability(p):
        return False
    for weight, A, B, bias, scale, of_part in parts:
        for tensor in (weight, A, B, scale):
            if not isinstance(tensor, Tensor):
                return False
        for tensor in (bias, of_part, seed):
            if tensor is not None and not isinstance(tensor, Tensor):
                return False
    return True


def group(x: Tensor, parts: Sequence[Part], p: float, seed: Tensor | None) -> list[Tensor] | None:
    """lora_group in one launch, by csrc's autograd."""
    extension = csrc()
    if extension is None or not are_plain(x, parts, seed, p):
        return None
    return extension.lora_group(x, flatten(parts), seed, p)


def mlp(x: Tensor, parts: Sequence[Part], p: float, seed: Tensor | None, act, save: str) -> Tensor | None:
    """lora_mlp in two launches, by csrc's autograd."""
    extension = csrc()
    if extension is None or not are_plain(x, parts, seed, p):
        return None
    return extension.lora_mlp(x, flatten(parts), seed, DOWN_SEED, p, act, save == "all")
