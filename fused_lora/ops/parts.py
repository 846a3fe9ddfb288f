"""A part is what one linear adds to a pass. It is described here once: ops take a list of them as one flat list."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..formats import Stored


class Part(NamedTuple):
    """y = gain (x W^T + scale dropout(x) A^T B^T) + bias, as one of the linears of a pass.

        weight (N, K), frozen: a tensor, or in a format   A (r, K), B (N, r) in any floating dtype, r = 0 for none
        bias (N,) or None
        gain (N,) in float32 (float64 beside such a weight), or None for 1

    scale is a float, or a 0-dim tensor in float32 (float64 beside such a weight) on weight's device. seed is that of
    the part's dropout, an int64 on the device, which the functions of this package fill in.
    """

    weight: Tensor | Stored
    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    seed: Tensor | None = None
    gain: Tensor | None = None

    @property
    def r(self) -> int:
        return self.A.shape[0]


SIZE = len(Part._fields) + 2  # of a part among flat ones: a weight's codes, and last its scale and outer or None


def flatten(parts: Sequence[Part]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in _tensors(part)]


def _tensors(part: Part) -> tuple:
    weight, *others = part
    if not isinstance(weight, Stored):
        return *part, None, None
    return weight.codes, *others, weight.scale, weight.outer


def unflatten(tensors: Sequence[Tensor | None]) -> list[Part]:
    """Also of what stands for a part's tensors one by one, as their needs of gradients do."""
    return [_part(*tensors[i : i + SIZE]) for i in range(0, len(tensors), SIZE)]


def _part(weight, A, B, bias, scale, seed, gain, of_codes, outer) -> Part:
    if isinstance(of_codes, Tensor):
        weight = Stored(weight, of_codes, outer, B.shape[0], A.shape[1])
    return Part(weight, A, B, bias, scale, seed, gain)


def columns(flat: Sequence, parts: int) -> list[list]:
    """What stands in `flat` for all parts one after another, kind by kind."""
    return [list(flat[i : i + parts]) for i in range(0, len(flat), parts)]


def trains(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether autograd wants gradients of a pass."""
    if not torch.is_grad_enabled():
        return False
    read = (x, *(tensor for part in parts for tensor in (part.A, part.B, part.bias, part.gain)))
    return any(tensor is not None and tensor.requires_grad for tensor in read)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What torch.autocast computes a linear of x in, or None where it leaves it alone."""
    kind = x.device.type  # of which `meta` knows no autocast
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def autocast(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Part]]:
    """As torch.nn.functional.linear: activations, weight and bias in autocast's dtype. A and B keep theirs."""
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is None:
        return x, list(parts)
    for part in parts:
        checks.check_frozen(part.weight)  # a cast one would be no parameter any more
    cast = [
        part._replace(weight=_cast(part.weight, dtype), bias=part.bias if part.bias is None else part.bias.to(dtype))
        for part in parts
    ]
    return x.to(dtype), cast


def _cast(weight: Tensor | Stored, dtype: torch.dtype) -> Tensor | Stored:
    return weight if isinstance(weight, Stored) else weight.to(dtype)


def check(x: Tensor, parts: Iterable[Part], p: float, seed: Tensor | None, names: Sequence[str]) -> None:
    """All tensors of parts that read x; errors begin with the part's name."""
    for name, part in zip(names, parts, strict=True):
        try:
            checks.check_lora_linear(x, *part[:5], p, seed, part.gain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None


def with_factors(part: Part) -> Part:
    """A part of rank 0 as one of rank 1, to be checked."""
    A, B = part.A, part.B
    if not isinstance(A, Tensor) or not isinstance(B, Tensor) or A.shape[:1] != (0,):
        return part
    if B.shape[1:] != (0,):
        raise ValueError(f"B must have 0 columns to match A {tuple(A.shape)}, got {tuple(B.shape)}")
    return part._replace(A=A.new_empty(1, *A.shape[1:]), B=B.new_empty(*B.shape[:1], 1))


def complete(x: Tensor, parts: Sequence[Part], seed: Tensor | None) -> list[Part]:
    """Scales as tensors, by a fill, which a CUDA graph can hold (a copy from the host it cannot); and the seed."""
    dtype = checks.scale_dtype(x)
    scales = [
        part.scale if isinstance(part.scale, Tensor) else torch.full((), part.scale, dtype=dtype, device=x.device)
        for part in parts
    ]
    return [part._replace(scale=scale, seed=seed) for part, scale in zip(parts, scales, strict=True)]


def drawn_seed(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """The seed of a pass: None where nothing is dropped, drawn from torch's generator where none is given."""
    if p == 0 or seed is not None:
        return seed if p else None
    return torch.randint(2**62, (), dtype=torch.int64, device=x.device)
