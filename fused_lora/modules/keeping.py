"""Keeping: the adapters of a bank, and the memory in which they lie."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.autograd import watched
from ..segments import SIZES, Place, size_of
from .routing import check_name, route
from .slab import Slab

_keys = itertools.count()


@dataclass(eq=False)
class Adapter:
    """One of a bank's: scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""

    r: int
    lora_alpha: float
    use_rslora: bool
    place: Place
    lora_dropout: float = 0.0
    serial: int = field(default_factory=itertools.count().__next__)  # no other adapter's

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Keeping(nn.Module):
    """What LoRABank has of it: lora_A, lora_B and adapters, beside a weight."""

    weight: Tensor

    def __init__(self, K: int, N: int, ranks: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.adapters: dict[str, Adapter] = {}
        self._held: dict[str, tuple[Tensor, Tensor]] = {}  # factors that are no parameters: a cache's
        self._slab = Slab(K, N, ranks, device, dtype)
        self._captured = False
        self.changes = 0  # of lora_alpha and lora_dropout, which checkpoints do not survive
        self._key = next(_keys)  # by which routes know it
        self._default: route | None = None
        self.register_load_state_dict_post_hook(_settle_loaded)

    def add_adapter(
        self, name: str, r: int, lora_alpha: float = 1.0, use_rslora: bool = False, lora_dropout: float = 0.0
    ) -> None:
        """A new one: A kaiming-uniform with a = sqrt 5, B zero. lora_dropout acts on its input in training."""
        self.check_new(name, r, lora_alpha, lora_dropout)
        place = self._room(size_of(r))
        self._slab.take(place)
        self.adapters[name] = Adapter(r, lora_alpha, use_rslora, place, lora_dropout)
        A, B = self._slab.factors(place, r)
        self.lora_A.register_parameter(name, nn.Parameter(A))
        self.lora_B.register_parameter(name, nn.Parameter(B))
        self._rescale(name)
        self.reset_lora_parameters(name)

    def check_new(self, name: str, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        """Whether add_adapter would succeed, but for memory."""
        self.check_name(name)
        checks.check_rank(r)
        if r > SIZES[-1]:
            raise ValueError(f"r must be at most {SIZES[-1]} in a bank, got {r}")
        checks.check_scale("lora_alpha", lora_alpha)
        checks.check_probability("lora_dropout", lora_dropout)
        if self._captured and self._slab.find(size_of(r)) is None:
            raise RuntimeError(
                "a captured CUDA graph reads the adapters where they lie, and there is no room for another one: "
                "ask for it by capacity= before graphs are captured"
            )

    def check_name(self, name: str) -> None:
        """Whether an adapter more can have it."""
        check_name("name", name)
        if name in self.adapters:
            raise ValueError(f"name must be new, got {name!r}, which the bank has")
        if hasattr(self.lora_A, name):
            raise ValueError(f"name must be none that every nn.Module has, got {name!r}")

    def _room(self, size: int) -> Place:
        place = self._slab.find(size)
        while place is None:
            self._slab.grow()
            self._settle()
            place = self._slab.find(size)
        return place

    def reserve(self, r: int) -> Place:
        """Room for adapters that are held."""
        place = self._room(size_of(r))
        self._slab.take(place)
        return place

    def hold(self, name: str, adapter: Adapter) -> None:
        """An adapter whose factors somebody else brings into its place: no parameters of the bank."""
        self.check_name(name)
        self.adapters[name] = adapter
        self._held[name] = self._slab.factors(adapter.place, adapter.r)
        self._rescale(name)

    def drop(self, name: str) -> None:
        """Undoes hold. Passes that saved the factors and routes that were made before raise RuntimeError."""
        for factor in self._held.pop(name):
            torch.autograd.graph.increment_version(factor)
        del self.adapters[name]

    def delete_adapter(self, name: str) -> None:
        """Its memory is free for the next one. Routes that were made before raise RuntimeError."""
        adapter = self.adapter(name)
        if name in self._held:
            raise ValueError(f"name must be no adapter of a cache, got {name!r}")
        del self.adapters[name]
        for factors in (self.lora_A, self.lora_B):
            parameter = factors._parameters.pop(name)
            parameter.data = parameter.data.clone()  # whoever still holds it has no part of another's memory
        self._slab.give_back(adapter.place)

    def rename_adapter(self, old: str, new: str) -> None:
        """The same parameters under another name. Routes that were made before raise RuntimeError."""
        self.adapter(old)
        self.check_name(new)
        if old in self._held:
            raise ValueError(f"old must be no adapter of a cache, got {old!r}")
        self.adapters = {new if name == old else name: each for name, each in self.adapters.items()}
        for factors in (self.lora_A, self.lora_B):
            pairs = [(new if name == old else name, each) for name, each in factors._parameters.items()]
            factors._parameters.clear()
            factors._parameters.update(pairs)

    def adapter(self, name: str) -> Adapter:
        """By name; ValueError for none."""
        if name not in self.adapters:
            raise ValueError(f"name must be one of the bank's adapters ({_listed(self.adapters)}), got {name!r}")
        return self.adapters[name]

    @torch.no_grad()
    def reset_lora_parameters(self, name: str) -> None:
        """A kaiming-uniform with a = sqrt 5, that is U(-1/sqrt(K), 1/sqrt(K)); B zero."""
        self.adapter(name)
        nn.init.kaiming_uniform_(self.lora_A._parameters[name], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B._parameters[name])

    def set_lora_alpha(self, name: str, lora_alpha: float, use_rslora: bool | None = None) -> None:
        """The scale changes in place: nothing recompiles, and captured CUDA graphs see it."""
        checks.check_scale("lora_alpha", lora_alpha)
        adapter = self.adapter(name)
        adapter.lora_alpha = lora_alpha
        adapter.use_rslora = adapter.use_rslora if use_rslora is None else use_rslora
        self._change(name)

    def set_lora_dropout(self, name: str, lora_dropout: float) -> None:
        """The probability changes in place: captured CUDA graphs see it, if they were captured with another than 0."""
        checks.check_probability("lora_dropout", lora_dropout)
        self.adapter(name).lora_dropout = lora_dropout
        self._change(name)

    def _change(self, name: str) -> None:
        self.changes += 1
        self._rescale(name)

    def _rescale(self, name: str) -> None:
        adapter = self.adapters[name]
        self._slab.rescale(adapter.place, adapter.scaling, adapter.lora_dropout)

    @property
    def lora_dtype(self) -> torch.dtype:
        """The adapters'."""
        return self._slab.A.dtype

    # ---- where factors lie

    @torch.no_grad()
    def _settle(self) -> None:
        """After parameters or the slab may have moved: the same parameters, with their values, in the slab. What was
        there before stays whose it was: the slab then is other memory, but where a captured graph reads it."""
        first = next(iter(self.lora_A._parameters.values()), None)
        if first is not None:
            self._slab.move(first.device, first.dtype)
        if not self._captured and not self._are_settled([name for name in self.adapters if name not in self._held]):
            self._slab.renew()
        for name, adapter in self.adapters.items():
            self._rescale(name)
            own = self._slab.factors(adapter.place, adapter.r)
            if self._is_settled(name):
                continue
            if name in self._held:
                self._held[name] = own
                continue
            for factor, place in zip(self.factors(name), own, strict=True):
                place.copy_(factor)
                factor.data = place

    def settle(self, names: Sequence[str]) -> None:
        """After whatever may have happened to the parameters of these adapters."""
        if not watched() and not self._are_settled(names):
            self._settle()

    @torch.no_grad()
    def slabs_with(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A and B^T of all adapters, where these adapters' factors are what stands for their parameters now, as
        torch.func.functional_call puts something there."""
        if watched() or torch.compiler.is_compiling() or self._are_settled(names):
            return self._slab.A, self._slab.up
        A, up = torch.zeros_like(self._slab.A), torch.zeros_like(self._slab.up)
        for name in names:
            rows = slice(self.adapters[name].place.rank, self.adapters[name].place.rank + self.adapters[name].r)
            own_A, own_B = self.factors(name)
            A[rows], up[rows] = own_A, own_B.t()
        return A, up

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """An adapter's A and B."""
        if name in self._held:
            return self._held[name]
        modules = self._modules  # since nn.Module's own way there takes the host as long as the rest of a call
        return modules["lora_A"]._parameters[name], modules["lora_B"]._parameters[name]

    def all_factors(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Several adapters' As, and their Bs."""
        if self._held:
            As, Bs = zip(*map(self.factors, names), strict=True) if names else ((), ())
            return list(As), list(Bs)
        As, Bs = (self._modules[kind]._parameters for kind in ("lora_A", "lora_B"))
        return [As[name] for name in names], [Bs[name] for name in names]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.adapters:
            like = fn(self._slab.A[:0])
            self._slab.move(like.device, like.dtype)
        self._settle()
        return self

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict:
        """Without a route and a cache's adapters, which are of this model."""
        own = {name: each for name, each in self.adapters.items() if name not in self._held}
        return vars(self) | {"_default": None, "_held": {}, "adapters": own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._key, self._captured, self._default = next(_keys), False, None
        self._slab.keep(adapter.place for adapter in self.adapters.values())
        self._settle()

    def note_capture(self) -> None:
        """A CUDA graph reads the slab where it lies now."""
        self._captured = True

    def _is_settled(self, name: str) -> bool:
        return self._are_settled((name,))

    def _are_settled(self, names: Sequence[str]) -> bool:
        return self._slab.has_all([self.adapters[name].place for name in names], *self.all_factors(names))


def _settle_loaded(bank: Keeping, _) -> None:
    """After load_state_dict, which may have put other parameters there."""
    bank._settle()


def _listed(names) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "it has none"
