"""Calls of plain tensors on a GPU, outside torch.compile, go straight to csrc, which has an autograd of its own in C++:
by way of this package's Python a call takes the host three times as long. What is not for it, or not right, comes back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, choices
from ..reference import DOWN_SEED
from .lora_parts import measured_obstacle
from .parts import Part, flatten, unflatten


def csrc():
    """The extension, whose functions give None for calls that are not for them; None without it."""
    if torch.compiler.is_compiling():
        return None
    extension = backends.eager_extension()
    return extension if extension is None or not choices.any_measured() else AskFirst(extension)


class AskFirst:
    """The extension where fused_lora.tune has measured, which csrc does not know: None too for calls of shapes that
    another backend computes faster."""

    def __init__(self, extension):
        self.extension = extension

    def lora_linear(self, x, weight, A, B, bias, scale, seed, p, gain):
        if _elsewhere(x, [Part(weight, A, B)], p):
            return None
        return self.extension.lora_linear(x, weight, A, B, bias, scale, seed, p, gain)

    def lora_group(self, x, flat, seed, p):
        return None if _elsewhere(x, unflatten(flat), p) else self.extension.lora_group(x, flat, seed, p)

    def lora_mlp(self, x, flat, seed, down_seed, p, act, saves_all):
        if _elsewhere(x, unflatten(flat), p):
            return None
        return self.extension.lora_mlp(x, flat, seed, down_seed, p, act, saves_all)


def _elsewhere(x: Tensor, parts: Sequence[Part], p: float) -> bool:
    """Whether another backend computes a part of the call faster; what is no call at all is for csrc to find."""
    matrices = all(tensor.dim() == 2 for part in parts for tensor in (part.weight, part.A, part.B))
    return matrices and x.dim() > 0 and measured_obstacle(x, parts, p) is not None


def is_probability(p) -> bool:
    return type(p) is float or (type(p) is int and 0 <= p <= 1)


def are_plain(x, parts: Sequence[Part], seed: Tensor | None, p: float) -> bool:
    """Whether csrc can be handed the arguments at all, to look at them itself."""
    if not isinstance(x, Tensor) or not x.is_cuda or not is_probability(p):
        return False
    for weight, A, B, bias, scale, of_part, gain in parts:
        for tensor in (weight, A, B, scale):
            if not isinstance(tensor, Tensor):
                return False
        for tensor in (bias, of_part, gain, seed):
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
