"""LoRA linears that read one x, each row by an adapter of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, segments
from ..formats import Stored
from . import parts as of_parts
from . import segmented
from .autograd import NOTHING, distinct, needs_formula, partials, watched
from .library import ops
from .parts import Part, columns


class Adapter(NamedTuple):
    """One of a linear's, whose factors lie in the slabs: A (r, K) in rows `rank` to rank + r of A, B (N, r) in as many
    columns of B. Its ranks begin at each of `begins` among those of the pass's windows, once in each that has it.
    Where torch.no_grad holds and nobody asks for plain torch (autograd.watched), A and B may be None.
    """

    A: Tensor | None
    B: Tensor | None
    rank: int
    begins: tuple[int, ...]


class Routed(NamedTuple):
    """A linear whose rows have adapters of their own.

    part: A (R, K), B (N, R) are slabs of all adapters, scale is (R / 16,) in float32, of each slice of 16 ranks.
    tables: which ranks each row has, from segments.tables, of a plan of windows of `window` ranks.
    adapters: those that have a segment.
    thresholds: (R / 16,) int32 where adapters drop entries of x on their way to A: segments.Drops'; scale then has
    1 / (1 - p) in it. The masks come of a seed drawn from torch's generator.
    """

    part: Part
    tables: segments.Tables
    window: int
    adapters: tuple[Adapter, ...]
    thresholds: Tensor | None = None


def lora_segments(x: Tensor, routed: Sequence[Routed]) -> tuple[Tensor, ...]:
    """y = x W^T + scale x A^T B^T + bias of each linear, A, B and scale those of a row's adapter; of several adapters
    the sum, and without one W and bias alone.

        x (..., K) bf16 | fp16 | fp32 | fp64   weight (N, K) in x's dtype, frozen   A (r, K), B (N, r)   ->   y (..., N)

    Gradients as in lora_linear, of each adapter over its own rows, zeros where it has none: sums in a fixed order. The
    tables stay on the device, so that a captured CUDA graph computes any division of its rows into the segments. What
    is no number in rows without an adapter stays there; in others, or in factors, it may spoil neighbours' results.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    x, parts = of_parts.autocast(x, [each.part for each in routed])
    for i, part in enumerate(parts):
        check(x, part, routed[i].tables, f"part {i}")
    parts, tables, window = complete(x, parts, routed)
    if watched():
        return Call.of_routed(parts, tables, routed).by_formula(x)
    if torch.is_grad_enabled():  # else nothing is asked of each adapter
        call = Call.of_routed(parts, tables, routed)
        if call.trains(x):
            return LoRASegmentsFunction.apply(x, call.layout, window, *distinct(x, call.tensors()))
    return tuple(run(x, parts, tables, window)[: len(parts)])


def complete(x: Tensor, parts: Sequence[Part], routed: Sequence[Routed]) -> tuple[list[Part], list[Tensor], int]:
    """With seeds where adapters drop; and the tables of all, and their window."""
    window = routed[0].window
    if any(each.window != window for each in routed):
        raise ValueError(f"window must be the same for all parts, got {sorted({each.window for each in routed})}")
    drawn = [
        part if each.thresholds is None else part._replace(seed=of_parts.drawn_seed(x, 1.0, None))
        for part, each in zip(parts, routed, strict=True)
    ]
    return drawn, segmented.flatten([segmented.of_routed(each) for each in routed]), window


def run(
    x: Tensor, parts: Sequence[Part], tables: list[Tensor], window: int, act=(), keep: str = "none"
) -> list[Tensor]:
    """What lora_parts_forward returns."""
    return ops.lora_parts_forward(x, of_parts.flatten(parts), 0.0, act, keep, tables, window)


def check(x: Tensor, part: Part, tables: segments.Tables, name: str) -> None:
    """Raises ValueError or TypeError for a part of x."""
    weight = part.weight
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: x must have {weight.shape[1]} as its last dimension, got {tuple(x.shape)}")
    checks.check_beside(f"{name}: x", x, weight)
    if x.device != weight.device:
        raise ValueError(f"{name}: x must be on {weight.device} like weight, got {x.device}")
    checks.check_frozen(weight)
    rows = x.shape[:-1].numel()
    blocks = tables.blocks.shape[1]
    if blocks != -(-rows // segments.BLOCK):
        raise ValueError(f"{name}: tables must be of x's {rows} rows, got {blocks} blocks of 256")


class Call(NamedTuple):
    """A pass by its tensors. layout: of each part, its adapters' (rank, begins); their factors A, B are in `factors`,
    one part's behind another's."""

    parts: list[Part]
    tables: list[Tensor]
    factors: list
    layout: tuple
    window: int

    def tensors(self) -> list:
        return [*of_parts.flatten(self.parts), *self.tables, *self.factors]

    @classmethod
    def of(cls, tensors: Sequence, layout: tuple, window: int) -> "Call":
        """From tensors(), or from what stands in their places."""
        count = len(layout)
        parts, tables = count * of_parts.SIZE, count * segmented.TENSORS
        first, second, third = tensors[:parts], tensors[parts : parts + tables], tensors[parts + tables :]
        return cls(of_parts.unflatten(first), list(second), list(third), layout, window)

    @classmethod
    def of_routed(cls, parts: list[Part], tables: list[Tensor], routed: Sequence[Routed]) -> "Call":
        """Of what complete() made of them."""
        factors = [factor for each in routed for adapter in each.adapters for factor in (adapter.A, adapter.B)]
        layout = tuple(tuple((adapter.rank, adapter.begins) for adapter in each.adapters) for each in routed)
        return cls(parts, tables, factors, layout, routed[0].window)

    def trains(self, x: Tensor) -> bool:
        """Whether autograd wants its gradients, where it wants any."""
        biases = [part.bias for part in self.parts if part.bias is not None]
        return any(tensor.requires_grad for tensor in (x, *biases, *self.factors))

    def adapters(self) -> list[list[Adapter]]:
        """Of each part."""
        pairs = iter(zip(self.factors[::2], self.factors[1::2], strict=True))
        return [[Adapter(*next(pairs), *each) for each in of_part] for of_part in self.layout]

    def by_formula(self, x: Tensor) -> tuple[Tensor, ...]:
        """The ys of parts that read x, in plain torch and in x's dtype."""
        return tuple(self.part_by_formula(i, x) for i in range(len(self.parts)))

    def part_by_formula(self, i: int, x: Tensor) -> Tensor:
        part, of = self.parts[i], segmented.unflatten(self.tables, self.window, len(self.parts))[i]
        factors = [(A.to(x.dtype), B.to(x.dtype), begins) for A, B, _, begins in self.adapters()[i]]
        drops = segmented.drops_of(part, of)
        return segments.lora_segments_ref(x, part.weight, part.bias, factors, part.scale, of.tables.rows, drops)

    def with_slabs(self, slabs: Sequence[tuple[Tensor, Tensor]]) -> "Call":
        """With the slabs, where the factors lie in them; else with others that have the factors' values."""
        each = zip(self.parts, slabs, self.adapters(), strict=True)
        return self._replace(parts=[_with_slabs(part, A, B, adapters) for part, (A, B), adapters in each])


def _with_slabs(part: Part, A: Tensor, B: Tensor, adapters: Sequence[Adapter]) -> Part:
    def rows(of: Tensor, adapter: Adapter) -> Tensor:
        return of[adapter.rank : adapter.rank + len(adapter.A)]

    up = B.t()
    pairs = [pair for each in adapters for pair in ((rows(A, each), each.A), (rows(up, each), each.B.t()))]
    if all(_is_same(place, factor) for place, factor in pairs):
        return part._replace(A=A, B=B)
    A, up = torch.zeros_like(A), torch.zeros_like(up)
    for each in adapters:
        rows(A, each).copy_(each.A)
        rows(up, each).copy_(each.B.t())
    return part._replace(A=A, B=up.t())


def _is_same(place: Tensor, factor: Tensor) -> bool:
    return place.data_ptr() == factor.data_ptr() and place.stride() == factor.stride() and place.dtype == factor.dtype


class LoRASegmentsFunction(torch.autograd.Function):
    """Factors are inputs for their gradients alone: what is multiplied are the slabs in which they lie.

    Saved are the factors, so that whoever looks at saved tensors sees them, and torch notices when they change. Where
    they come back as what they were, the slabs are read again; else slabs are made from them.
    """

    @staticmethod
    def forward(ctx, x, layout, window, *tensors):
        call = Call.of(tensors, layout, window)
        results = run(x, call.parts, call.tables, window)
        ys, xas = results[: len(layout)], results[len(layout) :]
        ctx.layout, ctx.window = layout, window
        ctx.save_for_backward(x, *xas, *saved(ctx, call).tensors())
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *all_dys):
        count, layout, window = len(all_dys), ctx.layout, ctx.window
        x, *rest = ctx.saved_tensors
        need_dx, _, _, *needs = ctx.needs_input_grad
        if all(dy is None for dy in all_dys) or not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        xas, call = rest[:count], Call.of(rest[count:], layout, window)
        each = zip(all_dys, call.parts, strict=True)
        dys = [x.new_zeros(*x.shape[:-1], part.weight.shape[0]) if dy is None else dy for dy, part in each]
        if needs_formula(dys):
            formula = lambda x, *tensors: Call.of(tensors, layout, window).by_formula(x)  # noqa: E731
            dx, *grads = partials(formula, dys, (x, *call.tensors()), (need_dx, *needs))
            return dx, None, None, *grads
        call = read_again(ctx, call)
        dx, grads = gradients(dys, [x] * count, xas, [None] * count, call, need_dx, Call.of(needs, layout, window))
        return dx, None, None, *grads.tensors()


def saved(ctx, call: Call) -> Call:
    """What is kept of a call for its backward pass, beside what ctx is given."""
    if not torch.compiler.is_compiling():
        ctx.slabs = [(part.A, part.B) for part in call.parts]
        call = call._replace(parts=[_without_slabs(part) for part in call.parts])
    # Scales and thresholds are of all adapters, and a change of another's is none of this pass's.
    return call._replace(
        parts=[part._replace(scale=part.scale.clone()) for part in call.parts],
        tables=segmented.with_own_thresholds(call.tables),
    )


def _without_slabs(part: Part) -> Part:
    if not isinstance(part.weight, Stored):
        return part._replace(A=None, B=None)
    N, K = part.weight.shape  # which its codes do not tell
    return part._replace(A=part.A.new_empty(0, K), B=part.B.new_empty(N, 0))


def read_again(ctx, call: Call) -> Call:
    """What was saved, with slabs."""
    return call if torch.compiler.is_compiling() else call.with_slabs(ctx.slabs)


def gradients(dys, xs, xas, dxas, call: Call, need_dx: bool, needs: Call) -> tuple[Tensor | None, Call]:
    """dx, and the gradients in the places of the call's tensors."""
    of_adapters = needs.adapters()
    wanted = [any(each.A for each in adapters) for adapters in of_adapters]
    wanted += [any(each.B for each in adapters) for adapters in of_adapters]
    wanted += [part.bias for part in needs.parts]
    dx, *grads = ops.lora_parts_backward(
        dys, xs, of_parts.flatten(call.parts), xas, dxas, 0.0, need_dx, wanted, [], [], False, [],
        call.tables, call.window,
    )  # fmt: skip
    dAs, dBs, dbiases = columns(grads, len(dys))
    factors: list[Tensor | None] = []
    for dA, dB, adapters, need in zip(dAs, dBs, call.adapters(), of_adapters, strict=True):
        for adapter, needed in zip(adapters, need, strict=True):
            r = len(adapter.A)
            factors.append(_summed([dA[i : i + r] for i in adapter.begins]) if needed.A else None)
            factors.append(_summed([dB[:, i : i + r] for i in adapter.begins]) if needed.B else None)
    each = zip(dbiases, needs.parts, strict=True)
    parts = [NOTHING._replace(bias=dbias if part.bias else None) for dbias, part in each]
    return dx if need_dx else None, call._replace(parts=parts, tables=[None] * len(call.tables), factors=factors)


def _summed(grads: Sequence[Tensor]) -> Tensor:
    """Over an adapter's segments, in their order."""
    first, *others = grads
    for other in others:
        first = first + other
    return first
