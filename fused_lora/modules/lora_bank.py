"""LoRABank: one frozen linear with many adapters, of which each row of a batch has its own."""

import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, ops
from ..segments import SIZES, Place, size_of
from . import hooks, routing, siblings
from .attributes import parameter
from .protocol import PLAIN
from .slab import Slab

_keys = itertools.count()


@dataclass(eq=False)
class Adapter:
    """One of a bank's: scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""

    r: int
    lora_alpha: float
    use_rslora: bool
    place: Place

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRABank(nn.Module):
    """y = x W^T + bias for every row, and scale x A^T B^T by the adapter that route() gives the row.

        weight (N, K), bias (N,)      the frozen linear's, under nn.Linear's names
        lora_A.<name> (r, K), lora_B.<name> (N, r)    each adapter's, of any r up to 256, parameters of their own

    Adapters come by add_adapter, begin as LoRALinear's do, and are trained, frozen, saved and loaded as any parameters:
    a step of one changes no other. They lie side by side in memory, lora_B by columns, so that one launch computes them
    all, each by its own rank; the memory grows as they come, and capacity (ranks) asks for it before: captured CUDA
    graphs read it where it was, so that an adapter that does not fit raises RuntimeError after a capture.

    A forward outside of route() raises RuntimeError, but after set_adapter. lora_dtype is the adapters', and weight's
    unless it is given.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        lora_dtype=None,
        capacity: int = 0,
    ):
        like = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._begin(like, lora_dtype, capacity)
        self.take_base()

    def _begin(self, linear: nn.Linear, lora_dtype: torch.dtype | None, capacity: int) -> None:
        checks.check_count("capacity", capacity)
        if lora_dtype is not None:
            checks.check_dtype("lora_dtype", lora_dtype)
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.adapters: dict[str, Adapter] = {}
        dtype = lora_dtype or self.weight.dtype
        self._slab = Slab(self.in_features, self.out_features, capacity, self.weight.device, dtype)
        self._captured = False
        self._key = next(_keys)  # by which routes know it
        self._default: routing.route | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, lora_dtype: torch.dtype | None = None, capacity: int = 0) -> "LoRABank":
        """A bank on the linear's own parameters, which it freezes."""
        checks.check_base(linear)
        bank = cls.beside(linear, lora_dtype, capacity)
        bank.take_base()
        return bank

    @classmethod
    def beside(cls, linear: nn.Linear, lora_dtype: torch.dtype | None, capacity: int) -> "LoRABank":
        """from_linear without take_base: what can fail, before anything of the linear is changed."""
        checks.check_matrix("linear.weight", linear.weight)
        bank = cls.__new__(cls)
        bank._begin(linear, lora_dtype, capacity)
        return bank.train(linear.training)

    def take_base(self) -> None:
        """weight and bias stop requiring gradients."""
        for base in (self.weight, self.bias):
            if base is not None:
                base.requires_grad_(False)

    # ---- adapters

    def add_adapter(self, name: str, r: int, lora_alpha: float = 1.0, use_rslora: bool = False) -> None:
        """A new one: A kaiming-uniform with a = sqrt 5, B zero."""
        self.check_new(name, r, lora_alpha)
        place = self._room(size_of(r))
        self._slab.take(place)
        self.adapters[name] = Adapter(r, lora_alpha, use_rslora, place)
        A, B = self._slab.factors(place, r)
        self.lora_A.register_parameter(name, nn.Parameter(A))
        self.lora_B.register_parameter(name, nn.Parameter(B))
        self._slab.rescale(place, self.adapters[name].scaling)
        self.reset_lora_parameters(name)

    def check_new(self, name: str, r: int, lora_alpha: float) -> None:
        """Whether add_adapter would succeed, but for memory."""
        self.check_name(name)
        checks.check_rank(r)
        if r > SIZES[-1]:
            raise ValueError(f"r must be at most {SIZES[-1]} in a bank, got {r}")
        checks.check_scale("lora_alpha", lora_alpha)
        if self._captured and self._slab.find(size_of(r)) is None:
            raise RuntimeError(
                "a captured CUDA graph reads the adapters where they lie, and there is no room for another one: "
                "ask for it by capacity= before graphs are captured"
            )

    def check_name(self, name: str) -> None:
        """Whether an adapter more can have it."""
        routing.check_name("name", name)
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

    def delete_adapter(self, name: str) -> None:
        """Its memory is free for the next one. Routes that were made before raise RuntimeError."""
        adapter = self.adapter(name)
        del self.adapters[name]
        for factors in (self.lora_A, self.lora_B):
            parameter = factors._parameters.pop(name)
            parameter.data = parameter.data.clone()  # whoever still holds it has no part of another's memory
        self._slab.give_back(adapter.place)

    def rename_adapter(self, old: str, new: str) -> None:
        """The same parameters under another name. Routes that were made before raise RuntimeError."""
        self.adapter(old)
        self.check_name(new)
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
        self._slab.rescale(adapter.place, adapter.scaling)

    # ---- where factors lie

    @torch.no_grad()
    def _settle(self) -> None:
        """After parameters or the slab may have moved: the same parameters, with their values, in the slab."""
        first = next(iter(self.lora_A._parameters.values()), None)
        dtype = self._slab.A.dtype if first is None else first.dtype
        self._slab.move(self.weight.device if first is None else first.device, dtype)
        for name, adapter in self.adapters.items():
            self._slab.rescale(adapter.place, adapter.scaling)
            for factor, own in zip(self.factors(name), self._slab.factors(adapter.place, adapter.r), strict=True):
                if not _is_there(factor, own):
                    own.copy_(factor)
                    factor.data = own

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """An adapter's A and B."""
        return self.lora_A._parameters[name], self.lora_B._parameters[name]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._settle()
        return self

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict:
        """Without a route, which is of this model."""
        return vars(self) | {"_default": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._key, self._captured, self._default = next(_keys), False, None
        self._settle()

    # ---- computing

    def forward(self, input: Tensor) -> Tensor:
        if siblings.thread.call is not None:
            y = siblings.output(self, input)
            if y is not None:
                return y
        routed = routing.current(self, input)
        if not routed.adapters:
            return F.linear(input, self.weight, self.bias)
        return ops.lora_segments(input, [routed])[0]

    @property
    def frozen_weight(self) -> Tensor:
        """weight."""
        return self.weight

    @property
    def dropping(self) -> float:
        """Nothing is dropped."""
        return 0.0

    def lora_sources(self) -> tuple:
        """All that a result depends on, but for x."""
        return (parameter(self, "weight"), parameter(self, "bias"), *routing.sources(self))

    def why_not(self) -> str | None:
        """Why it is a plain linear now: never."""
        return None

    def offered(self, x: Tensor) -> ops.Routed | str:
        """What it computes of x, to be computed in its place; or why nobody may but by calling it."""
        reason = hooks.why_alone(self, LoRABank.forward) or routing.obstacle(self)
        if reason is not None:
            return reason
        if type(self.weight) not in PLAIN:
            return "it is in shards now"
        routed = routing.current(self, x)
        return routed if routed.adapters else "none of its adapters is in the route"

    def part(self, names: Iterable[str]) -> ops.Part:
        """The linear with the slabs, in which the factors of these adapters are what their parameters are now."""
        if not torch.compiler.is_compiling() and not all(map(self._is_settled, names)):
            self._settle()
        slab = self._slab
        return ops.Part(parameter(self, "weight"), slab.A, slab.B, parameter(self, "bias"), slab.scales)

    def _is_settled(self, name: str) -> bool:
        adapter = self.adapters[name]
        return all(map(_is_there, self.factors(name), self._slab.factors(adapter.place, adapter.r)))

    def note_capture(self) -> None:
        """A CUDA graph reads the slab where it lies now."""
        self._captured = True

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters={len(self.adapters)}"
        )


def _is_there(factor: Tensor, own: Tensor) -> bool:
    return factor.data_ptr() == own.data_ptr() and factor.dtype == own.dtype and factor.stride() == own.stride()


def _listed(names) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "it has none"
