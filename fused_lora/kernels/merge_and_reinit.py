"""ReLoRA's restart of many layers: the kernels of restart.py over all of them, in a handful of launches.

What the kernels cannot read where it lies goes through a workspace of fixed size: factors that have dtypes of their own
or rows that do not allow 16-byte accesses, and low halves in the host's memory. Those travel both ways at once, by rows
of a layer, while the GPU merges the rows before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .restart_tables import (
    Beginning,
    Filling,
    Update,
    by_kind,
    fill_up_launch,
    filled,
    is_open,
    merge_kind,
    merge_launch,
    reinit_launch,
    table_bytes,
    upload,
)
from .tiles import Gpu

SLOTS, SLOT_BYTES = 3, 20 * 2**20  # one coming, one being merged, one going
PIECES, MOST_PIECES = 2, 64  # of layers that a slot is filled with
BYTES_A_PROGRAM, ROW_BYTES = 256, 160  # of a slot, at least; of a table, at most. A piece is in three launches at most
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

    @cached_property
    def factor_dtype(self) -> torch.dtype:
        """In which a merge reads both."""
        return self.weight.dtype if self.A.dtype == self.B.dtype == self.weight.dtype else torch.float32

    @cached_property
    def staged(self) -> tuple[bool, bool]:
        """Whether a merge reads copies of A and of B. One of a rank that is filled up takes the other with it."""
        A, B = (
            not (factor.dtype == self.factor_dtype and factor.shape[1] % 8 == 0 and is_open(factor))
            for factor in (self.A, self.B)
        )
        return A or len(self.A) % 8 != 0, B

    @cached_property
    def is_streamed(self) -> bool:
        return self.low is not None and self.low.device != self.weight.device

    def workspace(self, rows: int) -> int:
        """Bytes that so many of its rows need."""
        cols, r, (A, B) = filled(self.A.shape[1]), filled(self.A.shape[0]), self.staged
        factors = (cols * A + rows * B) * r * self.factor_dtype.itemsize
        low = rows * cols * 2 * self.is_streamed
        return factors + low + 3 * ALIGNMENT if factors + low else 0

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
        """What the layers of a launch have in common: their merges, and the copies that are made for them."""
        low = self.low
        if self.is_streamed:  # its copy is contiguous, and there is none yet
            low = torch.empty(low.shape, dtype=low.dtype, device="meta")
        copied = ((factor.dtype, factor.stride(1) == 1) for factor in (self.A, self.B))
        fillings = (kind if is_copied else None for kind, is_copied in zip(copied, self.staged, strict=True))
        merge = merge_kind(self.weight, low, self.factor_dtype, filled(len(self.A)))
        return self.is_streamed, merge, *fillings


class Portion:
    """Layers, or pieces of one, that one launch merges, with their copies in a part of the workspace."""

    def __init__(self, layers: list[Layer], space: Tensor, stochastic: bool, gpu: Gpu):
        self.streamed: list[tuple[Tensor, Tensor]] = []  # (copy, low half)
        self._Bs = [layer.B for layer in layers]
        self._space, self._used = space, 0
        self._fillings: list[Filling] = []
        updates = [self._update(layer) for layer in layers]
        self.launches = [*map(fill_up_launch, by_kind(self._fillings)), merge_launch(updates, stochastic, gpu)]

    def merge(self) -> None:
        for launch in self.launches:
            launch.run()
        torch._foreach_zero_(self._Bs)

    def _update(self, layer: Layer) -> Update:
        low, (copies_A, copies_B) = layer.low, layer.staged
        r, K = filled(len(layer.A)), filled(layer.A.shape[1])
        A = self._filled_up(layer.A, r, K, layer.factor_dtype) if copies_A else layer.A
        B = self._filled_up(layer.B, len(layer.B), r, layer.factor_dtype) if copies_B else layer.B
        if layer.is_streamed:
            low = self._take(*low.shape, torch.int16)  # contiguous, or copies would need more memory
            self.streamed.append((low, layer.low))
        return Update(layer.weight, A, B, layer.scale, layer.seed, low)

    def _filled_up(self, factor: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        copy = self._take(rows, cols, dtype)
        self._fillings.append(Filling(factor, copy))
        return copy

    def _take(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A matrix in the workspace that begins at 16 bytes."""
        start, size = filled(self._used, ALIGNMENT), rows * cols * dtype.itemsize
        self._used = start + size
        return self._space[start : start + size].view(dtype).view(rows, cols)


def merge_and_reinit_(layers: list[Layer], stochastic: bool, gpu: Gpu) -> None:
    """Restarts every layer: the device's memory and the kernels first, so that what is missing is missed beforehand.

    Merged rows of B are zeroed at once: if this breaks off, every layer computes what it did.
    """
    device = layers[0].weight.device
    plain, streamed = (_groups([layer for layer in layers if layer.is_streamed == it]) for it in (False, True))
    size = max([*map(_size, plain), *(SLOTS * _size(group) for group in streamed)])
    space = torch.empty(filled(size, ALIGNMENT * SLOTS), dtype=torch.uint8, device=device)
    slots = space.chunk(SLOTS) if streamed else ()
    room = [torch.empty(_most_table_bytes(slot), dtype=torch.uint8, device=device) for slot in slots]
    resident = [Portion(group, space, stochastic, gpu) for group in plain]
    kinds = [Portion(pieces[:1], slots[0], stochastic, gpu) for pieces in by_kind([group[0] for group in streamed])]
    beginnings = [reinit_launch(group) for group in by_kind([Beginning(layer.A, layer.seed) for layer in layers])]
    launches = [launch for portion in resident + kinds for launch in portion.launches] + beginnings
    upload(launches, torch.empty(table_bytes(launches), dtype=torch.uint8, device=device))
    for launch in launches:
        launch.load()
    if streamed:
        _merge_streamed(streamed, slots, room, lambda group, slot: Portion(group, slot, stochastic, gpu))
    for portion in resident:
        portion.merge()
    for launch in beginnings:
        launch.run()


def _most_table_bytes(slot: Tensor) -> int:
    """Of the launches whose layers' copies are in a slot: a number for each program, the tables' rows, and room for
    tiles that pieces fill in part."""
    return filled(slot.numel() // BYTES_A_PROGRAM * 4 + MOST_PIECES * 3 * ROW_BYTES + 2**14, ALIGNMENT)


def _groups(layers: list[Layer]) -> list[list[Layer]]:
    """The layers' pieces by what one launch can merge: of a kind, and with room for their copies."""
    groups = []
    for pieces in by_kind([piece for layer in layers for piece in layer.pieces()]):
        most = SLOT_BYTES if pieces[0].is_streamed else SLOTS * SLOT_BYTES
        used = most + 1
        for piece in pieces:
            size = piece.workspace(len(piece.weight))
            if used + size > most or (pieces[0].is_streamed and len(groups[-1]) == MOST_PIECES):
                groups.append([])
                used = 0
            groups[-1].append(piece)
            used += size
    return groups


def _size(group: list[Layer]) -> int:
    """Bytes of workspace."""
    return sum(piece.workspace(len(piece.weight)) for piece in group)


def _merge_streamed(
    groups: list[list[Layer]],
    slots: Sequence[Tensor],
    room: list[Tensor],
    portion_of: Callable[[list[Layer], Tensor], Portion],
) -> None:
    """Each portion waits for its tables and low halves to arrive; these leave while the next is made, arrives and is
    merged."""
    here, arriving, leaving = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    free: list[torch.cuda.Event] = [here.record_event() for _ in range(SLOTS)]
    try:
        for i, group in enumerate(groups):
            slot = i % SLOTS
            portion = portion_of(group, slots[slot])
            arriving.wait_event(free[slot])
            with torch.cuda.stream(arriving):
                upload(portion.launches, room[slot])  # on another stream it would wait for the next portion's copies
                for copy, low in portion.streamed:
                    copy.copy_(low, non_blocking=True)
            here.wait_stream(arriving)
            portion.merge()
            leaving.wait_stream(here)
            with torch.cuda.stream(leaving):
                for copy, low in portion.streamed:
                    low.copy_(copy, non_blocking=True)
            free[slot] = leaving.record_event()
    finally:  # the workspace is given back after this, and the host may read the low halves
        arriving.synchronize()
        leaving.synchronize()
