"""Blobs: adapters in one slab of the host's memory, each in one piece, and their way into the slabs of banks."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modules.slab import Slab
from ..segments import Place
from . import files


@dataclass(eq=False)
class _Staging:
    """A buffer on the device for one blob."""

    blob: Tensor
    rows: dict[str, tuple[Tensor, Tensor]]  # of each layer, in it
    empty: torch.Event | None = None  # behind what was spread from it last


class Blobs:
    """A blob has r rows of A and r of B^T for each layer, zeros where an adapter has fewer, in the order of the layers:
    so it moves by one copy, and what was in a slot before is gone.

    On a GPU the memory is pinned, and blobs move on streams of their own: to a buffer on the device, and from there to
    their rows in the slabs, while the next one comes to another buffer.
    """

    def __init__(self, slabs: dict[str, Slab], r: int, count: int):
        self._slabs, self._r = slabs, r
        first = next(iter(slabs.values())).A
        kinds = {(slab.A.dtype, slab.A.device) for slab in slabs.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"a cache's layers must have factors of one dtype on one device, got {sorted(map(str, kinds))}"
            )
        self._device, dtype = first.device, first.dtype
        self._size = sum(r * (slab.A.shape[1] + slab.up.shape[1]) for slab in slabs.values())
        self._host = torch.zeros(count, self._size, dtype=dtype)
        self._of: dict[str, int] = {}
        self._free = list(range(count))[::-1]
        self._leaving: dict[int, torch.Event] = {}  # behind the last copy of a blob
        self._copies = self._spreads = None  # streams
        self._staging: list[_Staging] = []  # the one that was filled last at the end
        if self._device.type == "cuda":
            _pin(self._host)
            weakref.finalize(self, _unpin, self._host)
            self._copies, self._spreads = (torch.cuda.Stream(self._device) for _ in range(2))
            buffers = [torch.empty(self._size, dtype=dtype, device=self._device) for _ in range(2)]
            self._staging = [_Staging(buffer, self._rows(buffer)) for buffer in buffers]

    def _rows(self, blob: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, K) and B^T (r, N) of each layer in a blob."""
        found, at = {}, 0
        for layer, slab in self._slabs.items():
            pair = []
            for width in (slab.A.shape[1], slab.up.shape[1]):
                pair.append(blob[at : at + self._r * width].view(self._r, width))
                at += self._r * width
            found[layer] = tuple(pair)
        return found

    def write(self, name: str, factors: dict[str, dict[str, Tensor]]) -> None:
        """A new blob. RuntimeError where there is no room."""
        if not self._free:
            raise RuntimeError(f"the host's memory holds {len(self._host)} adapters, and has them: remove one")
        self._of[name] = self._free.pop()
        if self._of[name] in self._leaving:  # what was there may still be on its way
            self._leaving.pop(self._of[name]).synchronize()
        blob = self._host[self._of[name]].zero_()
        rows = self._rows(blob)
        for layer, pair in factors.items():
            A, up = rows[layer]
            own_A, own_B = (pair[which].detach() for which in files.FACTORS)
            A[: len(own_A)].copy_(own_A)
            up[: len(own_A)].copy_(own_B.t())

    def free(self, name: str) -> None:
        """Its room is the next one's."""
        if name in self._of:
            self._free.append(self._of.pop(name))

    def bring(self, name: str, places: dict[str, Place], after: torch.Event | None) -> torch.Event | None:
        """Into the rows of the slabs, behind an event; the event behind which it is there, or None: it is."""
        blob = self._host[self._of[name]]
        if self._copies is None:
            self._spread(self._rows(blob), places)
            return None
        staging = self._staging.pop(0)
        self._staging.append(staging)
        with torch.cuda.stream(self._copies):
            if staging.empty is not None:
                self._copies.wait_event(staging.empty)
            staging.blob.copy_(blob, non_blocking=True)
            self._leaving[self._of[name]] = copied = self.mark()
        with torch.cuda.stream(self._spreads):
            for event in filter(None, (copied, after)):
                self._spreads.wait_event(event)
            self._spread(staging.rows, places)
            staging.empty = self.mark()
        for slab in self._slabs.values():
            slab.filling = staging.empty
        return staging.empty

    def _spread(self, rows: dict[str, tuple[Tensor, Tensor]], places: dict[str, Place]) -> None:
        to, of = [], []
        for layer, pair in rows.items():
            slab, rank = self._slabs[layer], places[layer].rank
            to += [slab.A[rank : rank + self._r], slab.up[rank : rank + self._r]]
            of += pair
        torch._foreach_copy_(to, of, non_blocking=True)

    def mark(self) -> torch.Event | None:
        """An event on the current stream."""
        return None if self._copies is None else torch.cuda.current_stream(self._device).record_event()


def _pin(tensor: Tensor) -> None:
    """Where it lies: torch's own pinned memory comes in powers of two."""
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)
    if int(error) != 0:
        raise RuntimeError(f"the host has no memory that can be pinned: {tensor.numel() * tensor.element_size()} bytes")


def _unpin(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
