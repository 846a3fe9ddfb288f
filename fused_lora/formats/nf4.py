"""NF4 in bitsandbytes' layout: two codes a byte, over the flat order of a weight, a scale for each 64 of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .stored import Stored, check_weight

BLOCK, NESTED_BLOCK = 64, 256
COUNT = 256  # of the values of nested scales
# Quantiles of the normal distribution, with a zero, scaled to -1 to 1.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """W[i] = VALUES[codes[i]] * scale[i // 64] for each i of W's flat order.

        codes    uint8 (ceil(N K / 2), 1), the first of a pair in the upper half
        scales   absmax (ceil(N K / 64),) in float32; blocks run on from row to row where K is no multiple of 64

    nested: scale has absmax in 8 bits instead, and outer (257 + ceil(blocks / 256),) in float32 what makes it of them:
    an offset, 256 values, and a factor for each 256 blocks, absmax[i] = values[scale[i]] * factors[i // 256] + offset.
    QLoRA: Dettmers et al. 2023, arXiv:2305.14314.
    """

    nested: bool = False

    @property
    def name(self) -> str:
        return "nf4 with nested scales" if self.nested else "nf4"

    def quantise(self, weight: Tensor) -> Stored:
        """Codes are nearest by absmax itself, before it is nested."""
        check_weight(weight)
        weight = weight.detach().float()
        absmax = self.largest(weight.abs())
        codes = self.encode(self.in_codes(weight, self.spread(absmax, 0, *weight.shape)))
        scale, outer = nest(absmax) if self.nested else (absmax, None)
        return Stored(codes, scale, outer, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        pairs = self.codes_of(stored, first, last).flatten()
        start = first * stored.K % 2
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten()[start : start + (last - first) * stored.K]
        found = self.values(codes.device)[codes.int()].view(last - first, stored.K)
        return found * self.scales_of(stored, first, last)

    def rows_of_blocks(self, K: int) -> int:
        return BLOCK // math.gcd(BLOCK, K)

    def largest(self, sizes: Tensor) -> Tensor:
        flat = sizes.flatten()
        return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK).amax(1)

    def rescaled(self, stored: Stored, largest: Tensor, touched: Tensor, cover: bool) -> Stored:
        absmax = torch.where(touched, largest, self._absmax(stored, 0, len(largest)))
        if not self.nested:
            return stored._replace(scale=absmax)
        scale, outer = nest_again(stored.scale, stored.outer, absmax, touched, cover)
        return stored._replace(scale=scale, outer=outer)

    def spread(self, by_block: Tensor, first: int, last: int, K: int) -> Tensor:
        return _spread(by_block[_blocks(first, last, K)], first, last, K)

    def scales_of(self, stored: Stored, first: int, last: int) -> Tensor:
        blocks = _blocks(first, last, stored.K)
        return _spread(self._absmax(stored, blocks.start, blocks.stop), first, last, stored.K)

    def in_codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        return weight * (1.0 / torch.where(scales.abs() < 1e-38, 1e-38, scales))

    def values(self, device: torch.device) -> Tensor:
        return torch.tensor(VALUES, device=device)

    def encode(self, numbers: Tensor) -> Tensor:
        codes = torch.bucketize(numbers.flatten(), _between(self.values(numbers.device))).to(torch.uint8)
        codes = F.pad(codes, (0, codes.numel() % 2), value=_ZERO)
        return (codes[::2] << 4 | codes[1::2])[:, None]

    def codes_of(self, stored: Stored, first: int, last: int) -> Tensor:
        return stored.codes[first * stored.K // 2 : (last * stored.K + 1) // 2]

    def _absmax(self, stored: Stored, first: int, last: int) -> Tensor:
        """Of blocks from first to last."""
        if not self.nested:
            return stored.scale[first:last]
        offset, values, factors = unpack(stored.outer)
        factor = factors[torch.arange(first, last, device=stored.device) // NESTED_BLOCK]
        return values[stored.scale[first:last].int()] * factor + offset


_ZERO = VALUES.index(0.0)


def _blocks(first: int, last: int, K: int) -> slice:
    """Those that rows from first to last have a part in."""
    return slice(first * K // BLOCK, (last * K + BLOCK - 1) // BLOCK)


def _spread(of_blocks: Tensor, first: int, last: int, K: int) -> Tensor:
    start = first * K % BLOCK
    return of_blocks.repeat_interleave(BLOCK)[start : start + (last - first) * K].view(last - first, K)


def _between(values: Tensor) -> Tensor:
    """The middles of neighbours."""
    return (values[:-1] + values[1:]) / 2


def dynamic_values() -> Tensor:
    """(256,) in order: of each decade down to 1e-6 the middles of equal parts of 0.1 to 1, twice as many in each next
    one, with both signs; and 0 and 1. 8-bit optimizers: Dettmers et al. 2021, arXiv:2110.02861."""
    found = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6) * _between(bounds)).tolist()
        found += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(found))


def nest(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """absmax as scale and outer."""
    offset, values = absmax.mean(), dynamic_values().to(absmax.device)
    factors = _in_nested_blocks(absmax - offset).abs().amax(1)
    return _nested_codes(absmax - offset, values, factors), torch.cat([offset[None], values, factors])


def nest_again(scale: Tensor, outer: Tensor, absmax: Tensor, touched: Tensor, cover: bool) -> tuple[Tensor, Tensor]:
    """A changed absmax as scale and outer, which stay as they are for 256 blocks of which none is touched. For their
    sake the offset stays too: with another mean, every absmax would be rounded anew.

    cover: absmax is rounded up where it would come out smaller.
    """
    offset, values, factors = unpack(outer)
    centred, touched = absmax - offset, _in_nested_blocks(touched).any(1)
    factors = torch.where(touched, _in_nested_blocks(centred).abs().amax(1), factors)
    codes = _nested_codes(centred, values, factors).int()
    of_blocks = factors.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    if cover:
        codes = (codes + (values[codes] * of_blocks + offset < absmax)).clamp(max=COUNT - 1)
    codes = torch.where(touched.repeat_interleave(NESTED_BLOCK)[: len(codes)], codes.to(torch.uint8), scale)
    return codes, torch.cat([offset[None], values, factors])


def _in_nested_blocks(of_blocks: Tensor) -> Tensor:
    return F.pad(of_blocks, (0, -len(of_blocks) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)


def _nested_codes(centred: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    scaled = _in_nested_blocks(centred) / torch.where(factors == 0, 1, factors)[:, None]
    return torch.bucketize(scaled, _between(values)).to(torch.uint8).flatten()[: len(centred)]


def unpack(outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An outer's offset, values and factors."""
    return outer[0], outer[1 : 1 + COUNT], outer[1 + COUNT :]
