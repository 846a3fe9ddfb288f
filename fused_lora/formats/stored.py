"""A frozen weight in a format, and what a format is."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries of a weight that plain torch dequantises at once


class Stored(NamedTuple):
    """A weight W (N, K) as codes and scales. Which format makes W of them is seen in their dtypes (known.format_of).

    Where a weight is read it stands for one: it has a shape, rows can be cut out of it, and it has no gradient.
    """

    codes: Tensor
    scale: Tensor  # as the format has them: float32, or 8 bits beside an outer
    outer: Tensor | None
    N: int
    K: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.N, self.K))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self[:3]

    is_cuda = property(lambda self: self.codes.is_cuda)
    is_meta = property(lambda self: self.codes.is_meta)
    requires_grad = False

    def numel(self) -> int:
        return self.N * self.K

    def bytes(self) -> Tensor:
        """A copy of all that it is kept in, as one row of uint8."""
        parts = [tensor for tensor in self.tensors if tensor is not None]
        return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in parts])

    @torch.no_grad()
    def set_bytes_(self, kept: Tensor) -> None:
        """What bytes() gave, bit for bit."""
        parts = [tensor for tensor in self.tensors if tensor is not None]
        sizes = [tensor.numel() * tensor.itemsize for tensor in parts]
        for tensor, some in zip(parts, kept.to(self.device).split(sizes), strict=True):
            tensor.copy_(some.clone().view(tensor.dtype).view(tensor.shape))  # a copy lies where any dtype can begin

    def chunks(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """The first and the last row of parts that are small enough to be dequantised at once, or of the least rows
        that are a multiple."""
        step = max(1, CHUNK // max(1, self.K) // multiple) * multiple
        return ((first, min(first + step, self.N)) for first in range(0, self.N, step))


class Format(Protocol):
    """One way to keep weights."""

    name: str

    def quantise(self, weight: Tensor) -> Stored:
        """The nearest codes of a weight (N, K), by scales of its largest entries. ValueError for what is not finite."""

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        """Rows of W from first to last, in float32."""

    # What quantising is made of, for those who do it some rows at a time.

    def rows_of_blocks(self, K: int) -> int:
        """The least rows that end where blocks end (what shares a scale is a block). By tensor it is 1."""

    def largest(self, sizes: Tensor) -> Tensor:
        """Of each block, of some rows' entries without their signs."""

    def rescaled(self, stored: Stored, largest: Tensor, touched: Tensor, cover: bool) -> Stored:
        """stored with new scales, of blocks that are touched by their largest entries; the others keep theirs.

        cover: no entry may lie outside of what codes reach, where scales themselves are rounded.
        """

    def spread(self, by_block: Tensor, first: int, last: int, K: int) -> Tensor:
        """What there is one of for each block, for each entry of rows from first to last, or broadcast to them."""

    def scales_of(self, stored: Stored, first: int, last: int) -> Tensor:
        """The scales, spread."""

    def in_codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """weight over its scales, in the units of values."""

    def values(self, device: torch.device) -> Tensor:
        """What codes stand for, in order."""

    def encode(self, numbers: Tensor) -> Tensor:
        """The codes of the nearest values, as they are kept. Of all rows, or of rows_of_blocks or a multiple."""

    def codes_of(self, stored: Stored, first: int, last: int) -> Tensor:
        """Where the codes of rows from first to last are kept: a view."""


def check_weight(weight: Tensor) -> None:
    """Whether it can be quantised."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a matrix of floats, got {tuple(weight.shape)} of {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"weight must have entries, got {tuple(weight.shape)}")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("weight must be finite: a scale is of its largest entry")
