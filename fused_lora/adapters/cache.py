"""AdapterCache: thousands of adapters in the host's memory, of which some are in a model's banks."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checks
from ..modules import route
from ..modules.banks import banks_for
from ..modules.config import CONFIG, LoRAConfig, served
from ..modules.keeping import Adapter
from ..modules.routing import check_name, paths_of
from ..modules.selection import Selection
from ..segments import SIZES
from . import banks as of_banks
from . import files
from .host_memory import Blobs
from .reading import shape_errors, sort, weight_errors
from .slots import Slot


@dataclass(eq=False)
class _Entry:
    """An adapter: where it comes from; and its layers, with (r, lora_alpha, use_rslora), once it has a blob."""

    folder: Path | None
    layers: dict[str, tuple[int, float, bool]] | None = None


class AdapterCache:
    """Adapters by name in one slab of pinned memory, and the last ones that were used in slots of a model's banks.

        cache = AdapterCache(model, slots=8, r=16, host=1000)
        cache.add_folder("adapters")            # each a folder of PEFT's, read when it is first wanted
        cache.prefetch(["b"])                   # on its way while others compute
        with cache.route(["a", "__base__", "b"]):
            model(x)

    An adapter moves as one copy; one that has a slot moves not at all. A slot is given to another adapter, that of the
    longest unused one, once all kernels that read it are done; those in a route that is entered, and pinned ones, stay.
    What was computed with an adapter that has left since raises RuntimeError where it is read again: a route, a
    backward pass.

        slots, r   how many adapters the device holds, and the largest rank of any
        host       how many the host's memory holds, each of r (K + N) elements for each of the banks
        target_modules, exclude_modules, lora_dtype, base    as in add_adapter: which linears, and in what

    Raises ValueError naming the argument. S-LoRA: Sheng et al. 2023, arXiv:2311.03285.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        r: int,
        host: int,
        target_modules: str | Iterable[str] | None = None,
        exclude_modules: str | Iterable[str] | None = None,
        lora_dtype: torch.dtype | None = None,
        base=None,
    ):
        for name, count in (("slots", slots), ("r", r), ("host", host)):
            checks.check_count(name, count, least=1)
        if r > SIZES[-1]:
            raise ValueError(f"r must be at most {SIZES[-1]} in a bank, got {r}")
        self.model, self.r = model, r
        self._banks = banks_for(model, Selection(target_modules, exclude_modules), lora_dtype, 0, base=base)
        self._slots = [Slot({layer: bank.reserve(r) for layer, bank in self._banks.items()}) for _ in range(slots)]
        self._blobs = Blobs({layer: bank._slab for layer, bank in self._banks.items()}, r, host)
        self._entries: dict[str, _Entry] = {}
        self._resident: OrderedDict[str, Slot] = OrderedDict()  # the longest unused one first
        self._pins: dict[str, int] = {}

    # ---- what there is

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def resident(self) -> list[str]:
        """Those that have a slot, the longest unused one first."""
        return list(self._resident)

    def add(self, name: str, folder: str | os.PathLike) -> None:
        """An adapter of PEFT's, which is read and checked when it is first wanted."""
        self._check_new(name)
        if not files.is_there(Path(folder)):
            raise ValueError(f"{folder} is no adapter: it has no {CONFIG}")
        self._entries[name] = _Entry(Path(folder))

    def add_folder(self, folder: str | os.PathLike) -> list[str]:
        """All adapters in a folder, by the names of theirs, which are returned."""
        names = sorted(path.parent.name for path in Path(folder).glob(f"*/{CONFIG}"))
        if not names:
            raise ValueError(f"{folder} has no folders with adapters")
        for name in names:
            self._check_new(name)
        for name in names:
            self._entries[name] = _Entry(Path(folder) / name)
        return names

    def put(
        self, name: str, factors: dict[str, tuple[Tensor, Tensor]], lora_alpha: float, use_rslora: bool = False
    ) -> None:
        """An adapter by (A (r, K), B (N, r)) of its layers, which are copied."""
        self._check_new(name)
        checks.check_scale("lora_alpha", lora_alpha)
        tensors = {layer: dict(zip(files.FACTORS, pair, strict=True)) for layer, pair in factors.items()}
        layers = {layer: (len(A), float(lora_alpha), use_rslora) for layer, (A, _) in factors.items()}
        entry = _Entry(None)
        self._keep(name, entry, layers, tensors)
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """From the host's memory, and out of its slot."""
        self._check(name)
        if self._pins.get(name):
            raise ValueError(f"name must not be pinned or in a route, got {name!r}")
        if name in self._resident:
            self._evict(name)
        self._blobs.free(name)
        del self._entries[name]

    def _check_new(self, name: str) -> None:
        check_name("name", name)
        if name in self._entries or any(name in bank.adapters for bank in self._banks.values()):
            raise ValueError(f"name must be new, got {name!r}, which the cache or a bank has")

    def _check(self, name: str) -> None:
        if name not in self._entries:
            raise ValueError(f"name must be an adapter of the cache, got {name!r}")

    # ---- into the host's memory

    def _read(self, name: str) -> None:
        """A folder's adapter, as a blob."""
        entry = self._entries[name]
        if entry.layers is not None:
            return
        given, tensors = files.read(entry.folder)
        config = served(given)
        factors, biases, weights, errors = sort(tensors, config.use_dora)
        errors += weight_errors(self.model, weights)
        errors += of_banks.errors_of(self.model, name, config, factors, biases, None)
        if errors:
            raise ValueError(f"{entry.folder} does not fit the model:\n  " + "\n  ".join(errors))
        self._keep(name, entry, _layers_of(config, factors), factors)

    def _keep(self, name: str, entry: _Entry, layers: dict, factors: dict[str, dict[str, Tensor]]) -> None:
        if not layers:
            raise ValueError(f"{name} must have factors of at least one layer, got none")
        for layer, (r, _, _) in layers.items():
            if r < 1:
                raise ValueError(f"{name} has r={r} in {layer}, which must be at least 1")
            if layer not in self._banks:
                raise ValueError(f"{layer} of {name} is none of the cache's layers: target_modules")
            if r > self.r:
                raise ValueError(f"{name} has r={r} in {layer}, slots are for r={self.r} at most")
            errors = shape_errors(layer, factors[layer], r, self._banks[layer].frozen_weight.shape)
            if errors:
                raise ValueError(f"{name}: {errors[0]}")
            dtype = self._banks[layer].lora_dtype
            if not all(tensor.to(dtype).isfinite().all() for tensor in factors[layer].values()):
                raise ValueError(
                    f"the factors of {name} in {layer} must be finite: they would spoil other adapters' rows"
                )
        self._blobs.write(name, factors)
        entry.layers = layers

    # ---- into slots

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to bring adapters into slots, and does not wait."""
        if isinstance(names, str):
            raise TypeError(f"names must be several names, got the str {names!r}")
        for name in names:
            self._check(name)
            if name in self._resident:
                self._resident.move_to_end(name)
                continue
            self._read(name)
            for layer in self._entries[name].layers:
                self._banks[layer].check_name(name)
            self._fill(self._free_slot(), name)

    def _free_slot(self) -> Slot:
        empty = next((slot for slot in self._slots if slot.name is None), None)
        if empty is not None:
            return empty
        victim = next((name for name in self._resident if not self._pins.get(name)), None)
        if victim is None:
            raise RuntimeError(
                f"all {len(self._slots)} slots have adapters that are pinned or in a route: unpin some, route fewer at "
                "once, or ask for more by slots="
            )
        return self._evict(victim)

    def _evict(self, name: str) -> Slot:
        slot = self._resident.pop(name)
        for bank in self._banks.values():
            if name in bank.adapters:
                bank.drop(name)
        slot.name = None
        return slot

    def _fill(self, slot: Slot, name: str) -> None:
        used = self._blobs.mark() if slot.is_differentiated else slot.used
        slot.ready, slot.is_differentiated = self._blobs.bring(name, slot.places, after=used), False
        slot.await_scales(used)
        for layer, (r, lora_alpha, use_rslora) in self._entries[name].layers.items():
            self._banks[layer].hold(name, Adapter(r, lora_alpha, use_rslora, slot.places[layer]))
        slot.scaled = self._blobs.mark()
        slot.name = name
        self._resident[name] = slot

    def pin(self, name: str) -> None:
        """Into a slot, which it keeps until unpin was called as often."""
        self.prefetch([name])
        self._pins[name] = self._pins.get(name, 0) + 1

    def unpin(self, name: str) -> None:
        """Undoes one pin."""
        if not self._pins.get(name):
            raise ValueError(f"name must be pinned, got {name!r}")
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]

    @contextmanager
    def pinning(self, names: Iterable[str]) -> Iterator[None]:
        """Pins names, unless what follows fails."""
        pinned = []
        try:
            # Those that are there first, so that they do not leave for the others.
            for name in sorted(names, key=lambda name: name not in self._resident):
                self.pin(name)
                pinned.append(name)
            yield
        except BaseException:
            for name in pinned:
                self.unpin(name)
            raise

    def await_arrival(self, names: Iterable[str]) -> None:
        """What the current stream computes from now on finds them in their slots."""
        for name in names:
            self._resident[name].await_arrival()

    def release(self, names: Iterable[str]) -> None:
        """Unpins what the current stream has computed with."""
        for name in names:
            slot = self._resident[name]
            slot.used = self._blobs.mark()
            slot.is_differentiated |= torch.is_grad_enabled()
            self.unpin(name)

    # ---- computing

    def route(self, names: str | Sequence[str], rows: Sequence[int] | Tensor | None = None) -> "CacheRoute":
        """fused_lora.route by the cache's adapters, which are brought into slots when it is entered."""
        return CacheRoute(self, names, rows)


class CacheRoute:
    """A route whose adapters stay in their slots while it is entered."""

    def __init__(self, cache: AdapterCache, names: str | Sequence[str], rows):
        self._cache, self._names, self._rows = cache, names, rows
        self._used = sorted({name for path in paths_of(names) for name in path})
        for name in self._used:
            cache._check(name)
        if len(self._used) > len(cache._slots):
            raise ValueError(f"names must be at most {len(cache._slots)} adapters, as there are slots")
        self._entered: list[route] = []

    def __enter__(self) -> route:
        cache = self._cache
        with cache.pinning(self._used):
            cache.await_arrival(self._used)
            found = route(cache.model, self._names, self._rows).__enter__()
        self._entered.append(found)
        return found

    def __exit__(self, *error) -> None:
        self._entered.pop().__exit__(*error)
        self._cache.release(self._used)


def _layers_of(config: LoRAConfig, factors: dict) -> dict[str, tuple[int, float, bool]]:
    return {layer: (*config.of(layer), config.use_rslora) for layer in factors}
