"""Batches whose samples name their adapters, as PEFT's adapter_names does: the factors of a layer's adapters side by
side as ops.lora_segments reads them, and the tables that say which of them a row has."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops, segments
from ...modules.slab import Slab
from ...ops.segmented import weight_obstacle


class Named(NamedTuple):
    """An adapter of a layer."""

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    dropping: float


def obstacle(adapter: Named, bias: Tensor | None, is_dora: bool) -> str | None:
    """Why an adapter, LoRA or DoRA, is none that rows may have of their own, or None."""
    ranks = len(adapter.A)
    for found, reason in (
        (is_dora, "is DoRA"),
        (bias is not None, "has a bias of its factors"),
        (ranks > segments.SIZES[-1], f"has {ranks} ranks, more than {segments.SIZES[-1]}"),
        (isinstance(adapter.scaling, Tensor), "has a scale to be exchanged in compiled code"),
    ):
        if found:
            return f"adapter {adapter.name} {reason}"
    return None


def kernel_obstacle(x: Tensor, weight: Tensor, adapters: Sequence[Named]) -> str | None:
    """Why no kernel computes them of x, or None. In plain torch PEFT's forward is the better one: it multiplies each
    adapter's samples, where the op's formula multiplies all rows by all ranks."""
    return weight_obstacle(x, weight, segments.window_of(segments.size_of(len(adapter.A)) for adapter in adapters))


class Samples(NamedTuple):
    """What a batch of samples that have adapters at these places is for the kernels."""

    tables: segments.Tables
    window: int
    begins: dict[segments.Place, tuple[int, ...]]


# A call of a model asks for the same in each of its layers, and generation in each of its steps: two of a batch.
@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be read by a pass that is differentiated
def _samples(places: tuple[segments.Place | None, ...], rows: int, device: torch.device) -> Samples:
    """places: of each sample, which has so many rows."""
    runs = [(place, rows * len(list(run))) for place, run in groupby(places)]
    window = segments.window_of(place.size for place in places if place is not None)
    plan = segments.make_plan([[place] for place, _ in runs], window)
    counts = segments.on_device(device, [count for _, count in runs])
    ends = counts.cumsum(0, dtype=torch.int32)
    tables = segments.tables(plan, segments.constants(plan, device), ends, rows * len(places))
    return Samples(tables, window, plan.begins())


class _Copy(NamedTuple):
    """Where an adapter was copied to, and from what: while its memory is held, no other factor can be there."""

    place: segments.Place
    held: tuple[Tensor, Tensor]
    state: tuple

    def is_of(self, adapter: Named) -> bool:
        return self.state is not None and self.state == _state(adapter)


def _state(adapter: Named) -> tuple | None:
    """What changes whenever the adapter does; None where nobody would know: tensors of inference mode."""
    _, A, B, scaling, _ = adapter
    if A.is_inference() or B.is_inference():
        return None
    return A.data_ptr(), A._version, B.data_ptr(), B._version, len(A), scaling


class Copies:
    """The factors of a layer's adapters, copied when they are first named and where they have changed since, in the
    dtype of the layer's weight."""

    def __init__(self):
        self._slab: Slab | None = None
        self._copies: dict[str, _Copy] = {}

    def __reduce__(self):
        """The copy of a layer makes its own."""
        return type(self), ()

    def routed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, names: Sequence[str], adapters: Sequence[Named], own
    ) -> ops.Routed:
        """A linear whose samples have the adapters of their names, of which the layer has these. own: all that it
        has."""
        self._renew(weight, adapters, own)
        copies, slab = self._copies, self._slab
        places = {adapter.name: copies[adapter.name].place for adapter in adapters}
        samples = _samples(tuple(map(places.get, names)), x.shape[1:-1].numel(), x.device)
        part = ops.Part(weight, slab.A, slab.B, bias, slab.scales)
        each = [(A, B, places[name]) for name, A, B, *_ in adapters]
        routed = tuple(ops.Adapter(A, B, place.rank, samples.begins[place]) for A, B, place in each)
        return ops.Routed(part, samples.tables, samples.window, routed)

    @torch.no_grad()
    def _renew(self, weight: Tensor, adapters: Sequence[Named], own: Iterable[str]) -> None:
        slab = self._slab
        if slab is None or slab.A.device != weight.device or slab.A.dtype != weight.dtype:
            N, K = weight.shape
            slab, self._copies = Slab(K, N, 0, weight.device, weight.dtype), {}
            self._slab = slab
        copies = self._copies
        changed = [each for each in adapters if each.name not in copies or not copies[each.name].is_of(each)]
        if not changed:
            return
        for name in {*(copies.keys() - own), *(each.name for each in changed)} & copies.keys():
            slab.give_back(copies.pop(name).place)
        for adapter in changed:
            copies[adapter.name] = self._copy(adapter)

    def _copy(self, adapter: Named) -> _Copy:
        _, A, B, scaling, _ = adapter
        size = segments.size_of(len(A))
        while (place := self._slab.find(size)) is None:
            self._slab.grow()
        self._slab.take(place)
        self._slab.rescale(place, scaling)
        for to, factor in zip(self._slab.factors(place, len(A)), (A, B), strict=True):
            to.copy_(factor)
        return _Copy(place, (A.detach(), B.detach()), _state(adapter))
