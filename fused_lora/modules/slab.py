"""Slab: the memory in which the factors of all adapters of a linear lie side by side."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..reference import mask_threshold
from ..segments import SIZES, SLICE, Place

LEAST = 64  # ranks


class Slab:
    """A (R, K) and up (R, N), the transpose of B, with a row for each rank; of each slice of 16 ranks its adapter's
    scales and keeps, 1 / (1 - p), in float32, and thresholds, by which its mask drops (hashing.mask_threshold).

    Places begin at multiples of their size, and rows that no adapter has are zero. Where there is no room, R doubles,
    and everything moves: `moved` counts that.
    """

    @torch.inference_mode(False)
    def __init__(self, K: int, N: int, ranks: int, device=None, dtype=None):
        ranks = max(LEAST, -(-ranks // LEAST) * LEAST)
        self.A = torch.zeros(ranks, K, device=device, dtype=dtype)
        self.up = torch.zeros(ranks, N, device=device, dtype=dtype)
        self.scales = torch.zeros(ranks // SLICE, device=device, dtype=_scale_dtype(self.A))
        self.keeps = torch.zeros_like(self.scales)
        self.thresholds = torch.zeros(ranks // SLICE, device=device, dtype=torch.int32)
        self.taken = [False] * (ranks // SLICE)
        self.filling: torch.Event | None = None  # behind what another stream writes into it
        self._scaled: list[tuple[float, float] | None] = [None] * (ranks // SLICE)  # what rescale wrote
        self.moved = 0

    def __getstate__(self) -> dict:
        """As it is once all that was on its way is there."""
        self._await()
        return vars(self)

    @property
    def ranks(self) -> int:
        return len(self.A)

    @property
    def B(self) -> Tensor:
        """(N, R)."""
        return self.up.t()

    def find(self, size: int) -> Place | None:
        """The first room for a place, taken by nobody."""
        slices = size // SLICE
        for first in range(0, len(self.taken) - slices + 1, slices):
            if not any(self.taken[first : first + slices]):
                return Place(first * SLICE, size)
        return None

    def take(self, place: Place) -> None:
        self._mark(place, True)

    def give_back(self, place: Place) -> None:
        """Its rows are zero then, as the next one who has them finds them."""
        self._mark(place, False)
        self.A[place.rank : place.rank + place.size].zero_()
        self.up[place.rank : place.rank + place.size].zero_()

    def keep(self, places: Iterable[Place]) -> None:
        """Gives back all but these."""
        kept = {slice_ for place in places for slice_ in range(place.rank // SLICE, (place.rank + place.size) // SLICE)}
        for slice_, taken in enumerate(self.taken):
            if taken and slice_ not in kept:
                self.give_back(Place(slice_ * SLICE, SLICE))

    def _mark(self, place: Place, taken: bool) -> None:
        slices = place.size // SLICE
        self.taken[place.rank // SLICE : place.rank // SLICE + slices] = [taken] * slices

    def factors(self, place: Place, r: int) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r) of a place, dense, and with no version counter but their own."""
        rows = slice(place.rank, place.rank + r)
        return self.A[rows].data, self.up[rows].t().data

    def has_all(self, places: Sequence[Place], As: Sequence[Tensor], Bs: Sequence[Tensor]) -> bool:
        """Whether every A and B is what factors() gives of its place. Asked of each adapter in each call: without
        making views, and without a line of Python for each."""
        if self.A.is_meta:  # which lies nowhere
            each = zip(places, As, Bs, strict=True)
            return all(all(map(_is_there, (A, B), self.factors(place, len(A)))) for place, A, B in each)
        ranks = [place.rank for place in places]
        return (
            _begin_at(As, self.A, ranks)
            and _begin_at(Bs, self.up, ranks)
            and all(map(Tensor.is_contiguous, As))
            and [B.stride() for B in Bs].count((1, self.up.shape[1])) == len(Bs)
            and {each.dtype for each in (*As, *Bs)} <= {self.A.dtype}
        )

    def rescale(self, place: Place, scaling: float, p: float = 0.0) -> None:
        """p: by which the adapter drops. What is there already is not written again: a cache's adapters come to each
        layer, and most of them with one scale."""
        slices = slice(place.rank // SLICE, (place.rank + place.size) // SLICE)
        own = [(scaling, p)] * (place.size // SLICE)
        if self._scaled[slices] == own:
            return
        self._scaled[slices] = own
        self.scales[slices].fill_(scaling)
        self.keeps[slices].fill_(0 if p == 1 else 1 / (1 - p))
        self.thresholds[slices].fill_(mask_threshold(p))

    def _await(self) -> None:
        """What was on its way is there before it is copied, and before its memory is another's."""
        if self.filling is not None:
            torch.cuda.current_stream(self.A.device).wait_event(self.filling)
            self.filling = None

    @torch.inference_mode(False)
    def grow(self) -> None:
        """Twice the ranks, in other memory."""
        self._await()
        more = max(self.ranks, SIZES[-1])
        self.A = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        self.up = torch.cat([self.up, self.up.new_zeros(more, self.up.shape[1])])
        self.scales, self.keeps, self.thresholds = (
            torch.cat([each, each.new_zeros(more // SLICE)]) for each in (self.scales, self.keeps, self.thresholds)
        )
        self.taken += [False] * (more // SLICE)
        self._scaled += [None] * (more // SLICE)
        self.moved += 1

    @torch.inference_mode(False)
    def renew(self) -> None:
        """The same in other memory."""
        self._await()
        self.A, self.up = self.A.clone(), self.up.clone()
        self.moved += 1

    @torch.inference_mode(False)
    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """To other memory, with what is in it."""
        if (self.A.device, self.A.dtype) == (device, dtype):
            return
        self._await()
        self.A, self.up = _moved(self.A, device, dtype), _moved(self.up, device, dtype)
        self.scales, self.keeps = (_moved(each, device, _scale_dtype(self.A)) for each in (self.scales, self.keeps))
        self.thresholds = _moved(self.thresholds, device, torch.int32)
        self._scaled = [None] * len(self._scaled)  # scales may have been on meta, or in another dtype
        self.moved += 1


def _begin_at(factors: Sequence[Tensor], matrix: Tensor, rows: Sequence[int]) -> bool:
    """Whether each begins where its row of a matrix does."""
    begin, size = matrix.data_ptr(), matrix.shape[1] * matrix.element_size()
    return list(map(Tensor.data_ptr, factors)) == [begin + row * size for row in rows]


def _is_there(factor: Tensor, own: Tensor) -> bool:
    return factor.data_ptr() == own.data_ptr() and factor.dtype == own.dtype and factor.stride() == own.stride()


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if tensor.is_meta:  # which has no values
        return torch.zeros_like(tensor, device=device, dtype=dtype)
    return tensor.to(device, dtype)


def _scale_dtype(factors: Tensor) -> torch.dtype:
    return torch.promote_types(factors.dtype, torch.float32)
