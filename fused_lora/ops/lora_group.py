"""LoRA linears that read one x: x is read once, and its gradient is summed where it is computed."""

from collections.abc import Sequence

from torch import Tensor

from . import eager
from . import parts as of_parts
from .autograd import apply
from .lora_segments import Routed, lora_segments
from .parts import Part


def lora_group(
    x: Tensor, parts: Sequence[Part] | Sequence[Routed], p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(lora_linear(x, *part, p, seed) for each part): q, k and v, or gate and up.

        x (..., K)   parts of weight (N_i, K), A (r_i, K), B (N_i, r_i), bias (N_i,) or None, scale   ->   ys (..., N_i)

    All as in lora_linear; r_i = 0 is a part without factors, and all parts that have any drop the same entries of x. On
    Hopper forward and backward are one launch each for up to four parts, and dx is summed in its tiles. Parts may all
    be Routed: each row then has an adapter of its own (lora_segments).

    Raises ValueError or TypeError naming the part and the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    if not parts:
        raise ValueError("parts must have at least one entry")
    if isinstance(parts[0], Routed):  # which drop nothing
        return lora_segments(x, parts)
    x, parts = of_parts.autocast(x, parts)
    ys = eager.group(x, parts, p, seed)
    if ys is not None:  # else something is wrong, or for another backend
        return tuple(ys)
    of_parts.check(x, map(of_parts.with_factors, parts), p, seed, [f"part {i}" for i in range(len(parts))])
    return apply(x, of_parts.complete(x, parts, of_parts.drawn_seed(x, p, seed)), p)
