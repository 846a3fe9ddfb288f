"""The shapes that are measured: as they are given, or a model's."""

from collections.abc import Iterable
from typing import NamedTuple

from .. import checks
from ..extras import needs


class Shape(NamedTuple):
    """M tokens through a K -> N linear with an update of rank r."""

    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


def parse(text: str, tokens: Iterable[int], r: int) -> list[Shape]:
    """M,K,N,r as it stands; of anything else, a Hugging Face model's name or path, the linears at each count of tokens.

    Raises ValueError naming the argument, or as linear_sizes.
    """
    if is_shape(text):
        return [_shape(text)]
    with needs("tune"):
        from ..integrations.model_sizes import linear_sizes
    return [Shape(M, K, N, r) for K, N in linear_sizes(text) for M in tokens]


def is_shape(text: str) -> bool:
    """Whether it is one of numbers, well formed or not."""
    return "," in text or text.strip("-").isdigit()


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 4:
        raise ValueError(f"shape must be M,K,N,r, got {text!r}")
    for name, size in zip(Shape._fields, sizes, strict=True):
        if not size.isdigit():
            raise ValueError(f"{name} must be a positive integer, got {size!r} in {text!r}")
    shape = Shape(*map(int, sizes))
    for name, size in zip("MKN", shape, strict=False):
        checks.check_count(name, size, 1)
    checks.check_rank(shape.r)
    return shape
