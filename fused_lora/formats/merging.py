"""The merge into a weight that is kept as codes and scales: the specification, and what runs on a CPU.

    W += scale B A: dequantised, added in float32, and quantised again by scales of the sum.

All of it goes some rows at a time, twice: once to see the new scales, and whether all is finite; once to write. Beside
codes and scales that takes some 120 bytes for each of the CHUNK entries that are looked at together, and never the
whole of W.

A block is what shares a scale. Where nothing is added to a block, its bits stay. Quantising again what was dequantised
gives the same numbers in most formats, but not where scales are rounded themselves.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hashing import half_bits
from .stored import Format, Stored

ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Arrived:
    """What became of an update D = scale B A, which has changed W by C (the residual's part of W counts).

    size    |D| / |W|, of W before
    share   <C, D> / <D, D>: 1 where all of it arrived, in the mean
    error   |C - D| / |D|: what arrived too little, and the noise of rounding

    In Frobenius norms, summed in float64. Of an update of zeros share is 1 and error 0.
    """

    size: float
    share: float
    error: float

    @classmethod
    def of(cls, sums: Tensor) -> "Arrived":
        """Of |W|^2, |D|^2, <C, D> and |C - D|^2."""
        weight, update, along, lost = sums.tolist()
        if update == 0:
            return cls(0.0, 1.0, 0.0)
        size = math.sqrt(update / weight) if weight > 0 else math.inf
        return cls(size, along / update, math.sqrt(lost / update))


@torch.no_grad()
def merge_(
    stored: Stored,
    form: Format,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    residual: Tensor | None = None,
) -> Arrived:
    """W += scale B A, in place of stored's codes and scales, which it was quantised to by form.

        A (r, K), B (N, r) in any floating dtypes   residual (N, K), bf16 as a rule, on W's device or the host

    * rounding="nearest": what is below half a step between codes is lost.
    * "stochastic": up or down, each as likely as it is near, by a hash of (seed, row, column). Unbiased, and noisier.
      Small neighbouring seeds have rows in common: take seeds of 62 bits.
    * residual: what W has beside its codes. It is added, and keeps what rounding leaves: only its own rounding is lost.

    Where it breaks off, everything is as it was. Raises ValueError before anything is changed: for shapes, for an
    unknown rounding, a stochastic one without a seed or beside a residual, and for a sum that is not finite.
    """
    return prepared(stored, form, A, B, scale, rounding, seed, residual).write_()


@torch.no_grad()
def prepared(stored, form, A, B, scale, rounding="nearest", seed=None, residual=None) -> "Prepared":
    """merge_'s first look at all, with its errors. Of several weights each can be seen before the first is written."""
    _check(stored, A, B, rounding, seed, residual)
    update = updates(A, B, scale)
    before = Weight(form, stored, residual)
    chunks = list(stored.chunks(form.rows_of_blocks(stored.K)))
    largest, touched = _seen(before, update, chunks)
    if not largest.isfinite().all():
        raise ValueError("W + scale B A must be finite: a scale is of its largest entry")
    after = Weight(form, form.rescaled(stored, largest, touched, cover=rounding == "stochastic"), residual)
    seed = torch.as_tensor(seed, device=stored.device) if rounding == "stochastic" else None
    return Prepared(before, after, update, chunks, touched, seed)


@dataclass(frozen=True)
class Prepared:
    """A merge whose scales are known, and of which nothing is written yet."""

    before: "Weight"
    after: "Weight"
    update: Callable[[int, int], Tensor]
    chunks: list[tuple[int, int]]
    touched: Tensor
    seed: Tensor | None

    @torch.no_grad()
    def write_(self) -> Arrived:
        """All of it; or, where it breaks off, nothing."""
        kept = self.before.copied()
        try:
            return self._write_all()
        except BaseException:
            self.before.put_back_(kept)
            raise

    def _write_all(self) -> Arrived:
        stored, new = self.before.stored, self.after.stored
        sums = torch.zeros(4, dtype=torch.float64, device=stored.device)
        for rows in self.chunks:
            sums += _write(self.before, self.after, self.update(*rows), self.touched, self.seed, rows)
        stored.scale.copy_(new.scale)
        if stored.outer is not None:
            stored.outer.copy_(new.outer)
        return Arrived.of(sums)


@dataclass(frozen=True)
class Weight:
    """W, some rows at a time: what is stored, and the residual beside it."""

    form: Format
    stored: Stored
    residual: Tensor | None = None

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        found = self.form.dequantise(self.stored, first, last).to(dtype)
        return found if self.residual is None else found + self.residual[first:last].to(found.device, dtype)

    def copied(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._tensors()]

    def put_back_(self, kept: list[Tensor]) -> None:
        for tensor, before in zip(self._tensors(), kept, strict=True):
            tensor.copy_(before)

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (*self.stored.tensors, self.residual) if tensor is not None]


def updates(A: Tensor, B: Tensor, scale: float | Tensor) -> Callable[[int, int], Tensor]:
    """Rows of scale B A in float32, from a first to a last one."""
    low, up = A.float(), B.float()
    scale = torch.as_tensor(scale, dtype=torch.float32, device=A.device).reshape(())
    return lambda first, last: scale * (up[first:last] @ low)


def _seen(before: Weight, update: Callable, chunks: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Of each block: the largest entry of the sum, and whether anything is added."""
    found = []
    for rows in chunks:
        delta = update(*rows)
        total = before.rows(*rows) + delta
        found.append((before.form.largest(total.abs()), before.form.largest(delta.abs()) != 0))
    largest, touched = zip(*found, strict=True)
    return _together(largest).amax(0), _together(touched).any(0)


def _together(parts: Iterable[Tensor]) -> Tensor:
    """Of all chunks, with a first dimension to reduce: a format with one scale has found it in each of them."""
    parts = list(parts)
    return torch.cat(parts)[None] if parts[0].dim() > 0 else torch.stack(parts)


def _write(before: Weight, after: Weight, delta: Tensor, touched: Tensor, seed: Tensor | None, rows) -> Tensor:
    """Writes codes and residual of some rows, and returns the sums that Arrived is made of.

    Both weights have the same codes: before has the old ones until they are written, after the new ones from then on.
    """
    form, stored, (first, last) = before.form, before.stored, rows
    old, added = before.rows(first, last, torch.float64), form.spread(touched, first, last, stored.K)
    # What is left alone takes neither its residual in nor 0, which would make 0 of -0.
    total = torch.where(added, before.rows(first, last) + delta, form.dequantise(stored, first, last))
    scales = form.scales_of(after.stored, first, last)
    # Scales of scales have moved some blocks to which nothing is added, and the residual makes up for it.
    moved = added | (scales != form.scales_of(stored, first, last))
    numbers = form.in_codes(total, scales)
    if seed is not None:
        chosen = randomly(numbers, form.values(stored.device), half_bits(last - first, stored.K, seed, first))
        numbers = torch.where(added, chosen, numbers)
    form.codes_of(stored, first, last).copy_(form.encode(numbers))
    if before.residual is not None:
        rest = total - form.dequantise(after.stored, first, last)
        kept = before.residual[first:last]
        here = kept.to(stored.device)
        kept.copy_(torch.where(added, rest, torch.where(moved, here + rest, here)))
    change, delta = after.rows(first, last, torch.float64) - old, delta.double()
    lost = (change - delta).square().sum()
    return torch.stack([old.square().sum(), delta.square().sum(), (change * delta).sum(), lost])


def randomly(numbers: Tensor, values: Tensor, bits: Tensor) -> Tensor:
    """Each number as one of its two neighbours among values (in order), as likely as it is near: by 16 random bits."""
    above = torch.bucketize(numbers, values).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    nearness = (numbers - low) / (high - low)
    return torch.where(bits + 0.5 < nearness * 2**16, high, low)


def _check(stored: Stored, A: Tensor, B: Tensor, rounding: str, seed, residual: Tensor | None) -> None:
    N, K = stored.shape
    if A.dim() != 2 or A.shape[1] != K:
        raise ValueError(f"A must have shape (r, {K}) to match W {(N, K)}, got {tuple(A.shape)}")
    if B.shape != (N, A.shape[0]):
        raise ValueError(f"B must have shape ({N}, {A.shape[0]}) to match W and A, got {tuple(B.shape)}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "stochastic" and seed is None:
        raise ValueError("seed must be given for stochastic rounding")
    if residual is None:
        return
    if rounding == "stochastic":
        raise ValueError("residual keeps what rounding leaves: rounding must be nearest")
    if residual.shape != stored.shape or not residual.is_floating_point():
        raise ValueError(f"residual must be floats of shape {(N, K)}, got {tuple(residual.shape)} of {residual.dtype}")
