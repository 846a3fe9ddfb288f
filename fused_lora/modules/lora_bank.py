"""LoRABank: one frozen linear with many adapters, of which each row of a batch has its own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..formats import Format
from . import hooks, routing, siblings
from .attributes import parameter
from .frozen import Frozen, asked_base, check_linear, found_in
from .keeping import Keeping
from .protocol import are_plain
from .quantised import Taken


class LoRABank(Frozen, Keeping):
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

    def _begin(
        self, linear: nn.Linear, lora_dtype: torch.dtype | None, capacity: int, found: Taken | None = None
    ) -> None:
        checks.check_count("capacity", capacity)
        if lora_dtype is not None:
            checks.check_dtype("lora_dtype", lora_dtype)
        weight, dtype = linear.weight, linear.weight.dtype if found is None else found.dtype
        super().__init__(linear.in_features, linear.out_features, capacity, weight.device, lora_dtype or dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._start_on(linear, found)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        lora_dtype: torch.dtype | None = None,
        capacity: int = 0,
        base: str | Format | None = None,
    ) -> "LoRABank":
        """A bank on the linear's own parameters, which it freezes; with a base as LoRALinear.from_linear has it."""
        check_linear(linear)
        base = asked_base(base)
        bank = cls.beside(linear, lora_dtype, capacity, base)
        bank.quantise(linear, base)
        bank.take_base()
        return bank

    @classmethod
    def beside(
        cls, linear: nn.Linear, lora_dtype: torch.dtype | None, capacity: int, base: Format | None = None
    ) -> "LoRABank":
        """from_linear without take_base: what can fail, before anything of the linear is changed."""
        found = found_in(linear, base)
        bank = cls.__new__(cls)
        bank._begin(linear, lora_dtype, capacity, found)
        return bank.train(linear.training)

    def take_base(self) -> None:
        """weight and bias stop requiring gradients."""
        self._freeze()
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        if siblings.thread.call is not None:
            y = siblings.output(self, input)
            if y is not None:
                return y
        routed = routing.current(self, input)
        if not routed.adapters:
            return self._plainly(input)
        return ops.lora_segments(input, [routed])[0]

    @property
    def dropping(self) -> float:
        """The largest probability by which one of its adapters drops now."""
        return max([0.0, *(each.lora_dropout for each in self.adapters.values())]) if self.training else 0.0

    def lora_sources(self) -> tuple:
        """All that a result depends on, but for x."""
        return (*self.frozen_tensors(), parameter(self, "bias"), *routing.sources(self))

    def why_not(self) -> str | None:
        """Why it is a plain linear now: never."""
        return None

    def offered(self, x: Tensor) -> ops.Routed | str:
        """What it computes of x, to be computed in its place; or why nobody may but by calling it."""
        reason = hooks.why_alone(self, LoRABank.forward) or routing.obstacle(self)
        if reason is not None:
            return reason
        if not are_plain(self.frozen_weight):
            return "it is in shards now"
        routed = routing.current(self, x)
        return routed if routed.adapters else "none of its adapters is in the route"

    def part(self, names: Sequence[str]) -> ops.Part:
        """The linear with the slabs, in which the factors of these adapters are what their parameters are now."""
        A, up = self.slabs_with(names)
        return ops.Part(self.frozen_weight, A, up.t(), parameter(self, "bias"), self._slab.scales)

    def routed(self, names: tuple[str, ...], tables, window: int, adapters: tuple[ops.Adapter, ...]) -> ops.Routed:
        """What it computes of rows that have these adapters by the tables."""
        routed = ops.Routed(self.part(names), tables, window, adapters)
        if not (self.training and any(self.adapters[name].lora_dropout for name in names)):
            return routed
        scale = self._slab.scales * self._slab.keeps
        return routed._replace(part=routed.part._replace(scale=scale), thresholds=self._slab.thresholds)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"adapters={len(self.adapters)}" + (f", base={self.base.name}" if self.base is not None else "")
        )
