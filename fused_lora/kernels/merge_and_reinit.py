"""ReLoRA's restart of many layers: the kernels of restart.py over all of them, in a handful of launches.

What the kernels cannot read where it lies goes through a workspace of fixed size: factors that have dtypes of their own
or rows that do not allow 16-byte accesses, and low halves in the host's memory. Those travel both ways at once, by rows
of a layer, while the GPU merges the rows before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from . import tiles
from .restart_tables import (
    Beginning,
    Filling,
    Launch,
    Update,
    by_kind,
    fill_up_launch,
    filled,
    is_open,
    merge_launch,
    reinit_launch,
    upload,
)
from .tiles import Gpu

SLOTS, SLOT_BYTES = 3, 20 * 2**20  # one coming, one being merged, one going
PIECES = 2  # of layers, or more, fill a slot
ROWS_AT_ONCE = 64  # a multiple of the tiles' rows
ALIGNMENT = 16


@dataclass(frozen=True)
class Layer:
    """What a restart of one layer reads and writes. low may be in the host's memory, best pinned."""

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    seed: int
    low: Tensor | None

    @property
    def factor_dtype(self) -> torch.dtype:
        """In which a merge reads both."""
        return self.weight.dtype if self.A.dtype == self.B.dtype == self.weight.dtype else torch.float32

    @property
    def is_staged(self) -> bool:
        """Whether a merge reads copies of the factors."""
        return not all(m.dtype == self.factor_dtype and m.shape[1] % 8 == 0 and is_open(m) for m in (self.A, self.B))

    @property
    def is_streamed(self) -> bool:
        return self.low is not None and self.low.device != self.weight.device

    def workspace(self, rows: int) -> int:
        """Bytes that so many of its rows need."""
        if not (self.is_staged or self.is_streamed):
            return 0
        cols, r = filled(self.A.shape[1]), filled(self.A.shape[0])
        factors = (rows + cols) * r * self.factor_dtype.itemsize if self.is_staged else 0
        return factors + (rows * cols * 2 if self.is_streamed else 0) + 3 * ALIGNMENT

    def pieces(self) -> Iterator["Layer"]:
        """Itself, or if its low half is streamed a few rows at a time."""
        if not self.is_streamed:
            yield self
            return
        fixed = self.workspace(0)
        count = max(1, (SLOT_BYTES // PIECES - fixed) // (self.workspace(ROWS_AT_ONCE) - fixed)) * ROWS_AT_ONCE
        for i in range(0, len(self.weight), count):
            rows = slice(i, i + count)
            yield replace(self, weight=self.weight[rows], B=self.B[rows], low=self.low[rows])

    def kind(self) -> tuple:
        """What the layers of a launch have in common."""
        matrices = [self.weight] if self.low is None or self.is_streamed else [self.weight, self.low]
        rows = [(is_open(matrix), matrix.stride(1) == 1) for matrix in matrices]
        dtypes = self.weight.dtype, self.factor_dtype, self.low is not None
        return *dtypes, *rows, self.is_staged, self.is_streamed, tiles.rank_block(filled(len(self.A)), 256)


class Portion:
    """Layers, or pieces of one, that one launch merges, with their copies in a slot of the workspace."""

    def __init__(self, layers: list[Layer], slot: Tensor, stochastic: bool, gpu: Gpu):
        self.streamed: list[tuple[Tensor, Tensor]] = []  # (copy, low half)
        self._slot, self._used = slot, 0
        self._fillings: list[Filling] = []
        updates = [self._update(layer) for layer in layers]
        self.launches = [*map(fill_up_launch, by_kind(self._fillings)), merge_launch(updates, stochastic, gpu)]

    def _update(self, layer: Layer) -> Update:
        A, B, low = layer.A, layer.B, layer.low
        if layer.is_staged:
            r, K = filled(len(A)), filled(A.shape[1])
            A, B = (self._take(rows, cols, layer.factor_dtype) for rows, cols in ((r, K), (len(B), r)))
            self._fillings += [Filling(layer.A, A), Filling(layer.B, B)]
        if layer.is_streamed:
            K = low.shape[1]
            low = self._take(len(low), filled(K) if is_open(layer.weight) else K, torch.int16)[:, :K]
            self.streamed.append((low, layer.low))
        return Update(layer.weight, A, B, layer.scale, layer.seed, low)

    def _take(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A matrix in the slot that begins at 16 bytes."""
        start, size = ceil(self._used / ALIGNMENT) * ALIGNMENT, rows * cols * dtype.itemsize
        self._used = start + size
        return self._slot[start : start + size].view(dtype).view(rows, cols)


def merge_and_reinit_(layers: list[Layer], stochastic: bool, gpu: Gpu) -> None:
    """Restarts every layer: all tables and kernels first, so that whatever is missing is missed before a change."""
    groups = list(_portions(layers))
    slots = _slots(groups, layers[0].weight.device)
    portions = [Portion(group, slots[i % SLOTS], stochastic, gpu) for i, group in enumerate(groups)]
    merges = [launch for portion in portions for launch in portion.launches]
    beginnings = [reinit_launch(group) for group in by_kind([Beginning(layer.A, layer.seed) for layer in layers])]
    upload(merges + beginnings, layers[0].weight.device)
    for launch in merges + beginnings:
        launch.load()
    if any(portion.streamed for portion in portions):
        _merge_streamed(portions)
    else:
        _run(merges)
    _run(beginnings)
    torch._foreach_zero_([layer.B for layer in layers])


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def _portions(layers: list[Layer]) -> Iterator[list[Layer]]:
    """The layers' pieces in groups of one kind that fit into a slot, or of one piece that does not."""
    for group in by_kind([piece for layer in layers for piece in layer.pieces()]):
        portion, used = [], 0
        for piece in group:
            needed = piece.workspace(len(piece.weight))
            if portion and used + needed > SLOT_BYTES:
                yield portion
                portion, used = [], 0
            portion.append(piece)
            used += needed
        yield portion


def _slots(groups: list[list[Layer]], device) -> list[Tensor]:
    """As large as the largest group needs."""
    size = max(sum(piece.workspace(len(piece.weight)) for piece in group) for group in groups)
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]


def _merge_streamed(portions: list[Portion]) -> None:
    """Each portion waits for its low halves to arrive; they leave while the next is merged."""
    here, arriving, leaving = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    free: list[torch.cuda.Event] = [here.record_event() for _ in range(SLOTS)]
    for i, portion in enumerate(portions):
        arriving.wait_event(free[i % SLOTS])
        with torch.cuda.stream(arriving):
            for copy, low in portion.streamed:
                copy.copy_(low, non_blocking=True)
        here.wait_stream(arriving)
        _run(portion.launches)
        leaving.wait_stream(here)
        with torch.cuda.stream(leaving):
            for copy, low in portion.streamed:
                low.copy_(copy, non_blocking=True)
        free[i % SLOTS] = leaving.record_event()
    leaving.synchronize()  # the host may read them next
