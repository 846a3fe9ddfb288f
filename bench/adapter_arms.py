"""The ways to compute a linear whose rows have adapters of their own."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import LoRABank, backends, choices, route, segments
from fused_lora.integrations.peft import accelerate
from fused_lora.reference import lora_linear_ref

from .adapter_cases import Case
from .check import reference_results
from .shapes import Shape
from .variants import FLOOR, PACKAGE, SCALE, Problem, frozen_linear, fused_lora, make_problem

ONE, TRITON, GROUPED, LOOP, GATHERED = "one", "triton", "grouped", "loop", "gathered"
PEFT, ACCELERATED = "peft", "accelerated"
ADAPTERS = "adapters"  # the work of all but the frozen linear and one adapter


@dataclass
class Inputs:
    """x, weight and dy, and the factors of one adapter of the largest rank; and those of all adapters, with SCALE."""

    case: Case
    problem: Problem
    factors: list[tuple[Tensor, Tensor]]

    @classmethod
    def make(cls, case: Case, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """As make_problem has it: each update as large as the base product."""
        problem = make_problem(Shape(case.M, case.K, case.N, max(case.ranks)), device, dtype)
        generator = torch.Generator(device).manual_seed(1)

        def normal(rows: int, columns: int, std: float) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(std)

        factors = [(normal(r, case.K, case.K**-0.5), normal(case.N, r, r**-0.5)) for r in case.ranks]
        return cls(case, problem, factors)

    def expected(self, work: str) -> dict[str, Tensor]:
        """What run returns, by name, from fused_lora.reference one precision up."""
        return self._of_adapters() if work == ADAPTERS else reference_results(self.problem, work)

    def _of_adapters(self) -> dict[str, Tensor]:
        wide = torch.float32 if self.problem.x.dtype.itemsize == 2 else torch.float64
        x, weight = (each.detach().to(wide) for each in (self.problem.x, self.problem.weight))
        As, Bs = ([factor.to(wide).requires_grad_() for factor in column] for column in zip(*self.factors, strict=True))
        x.requires_grad_()
        ys = []
        for rows, (adapters, _) in zip(x.split(self.case.counts), self.case.rows, strict=True):
            A, B = torch.cat([As[i] for i in adapters]), torch.cat([Bs[i] for i in adapters], 1)
            ys.append(lora_linear_ref(rows, weight, A, B, None, SCALE))
        y = torch.cat(ys)
        grads = torch.autograd.grad(y, [x, *As, *Bs], self.problem.dy.to(wide), materialize_grads=True)
        names = ["x", *(f"A{i}" for i in range(len(As))), *(f"B{i}" for i in range(len(Bs)))]
        return {"y": y.detach()} | dict(zip(names, grads, strict=True))


@dataclass
class Arm:
    """step(x) -> y, and what it trains, of whose gradients `unpack` makes dA of each adapter and then dB of each.
    trains: whether it can; the others are for inference alone. forced: the backend of both passes, if not fused_lora's
    choice."""

    step: Callable[[Tensor], Tensor]
    trained: list[Tensor] = field(default_factory=list)
    unpack: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    work: str = ADAPTERS
    trains: bool = True
    forced: str | None = None

    def run(self, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
        """(y,) as in inference, or (y, dx, dAs, dBs)."""
        with backends.forcing(self.forced) if self.forced else nullcontext():
            return self._run(problem, backward)

    def _run(self, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (self.step(problem.x),)
        y = self.step(problem.x)
        dx, *grads = torch.autograd.grad(y, (problem.x, *self.trained), problem.dy)
        return (y, dx, *self.unpack(grads))


def _frozen(inputs: Inputs) -> Arm:
    return Arm(frozen_linear(inputs.problem), work="frozen")


def _one(inputs: Inputs) -> Arm:
    variant = fused_lora(inputs.problem)
    return Arm(variant.step, list(variant.parameters.values()), work="lora")


def _ours(inputs: Inputs) -> Arm:
    """A LoRABank through route, as anybody calls it."""
    case, names = inputs.case, [f"adapter_{i}" for i in range(len(inputs.factors))]
    bank = LoRABank.from_linear(frozen_linear(inputs.problem))
    for name, r, (A, B) in zip(names, case.ranks, inputs.factors, strict=True):
        bank.add_adapter(name, r, SCALE * r)
        with torch.no_grad():
            bank.lora_A.get_parameter(name).copy_(A)
            bank.lora_B.get_parameter(name).copy_(B)
    now = route(bank, [tuple(names[i] for i in adapters) for adapters, _ in case.rows], case.counts)

    def step(x: Tensor) -> Tensor:
        with now:
            return bank(x)

    return Arm(step, [factors.get_parameter(name) for factors in (bank.lora_A, bank.lora_B) for name in names])


def _by_triton(inputs: Inputs) -> Arm:
    x = inputs.problem.x
    with backends.forcing(TRITON):
        choice = choices.choose_segments(x.device, x.dtype, segments.BOX, True, False)
    if choice.name != TRITON:
        raise NotImplementedError(choice.reason)
    return replace(_ours(inputs), forced=TRITON)


def _loop(inputs: Inputs) -> Arm:
    """As everybody writes it, adapter by adapter."""
    case, weight = inputs.case, inputs.problem.weight
    As, Bs = ([each.clone().requires_grad_() for each in column] for column in zip(*inputs.factors, strict=True))

    def step(x: Tensor) -> Tensor:
        updates = []
        for rows, (adapters, _) in zip(x.split(case.counts), case.rows, strict=True):
            each = [F.linear(SCALE * F.linear(rows, As[i]), Bs[i]) for i in adapters]
            updates.append(reduce(torch.add, each))
        return F.linear(x, weight) + torch.cat(updates)

    return Arm(step, [*As, *Bs])


def _gathered(inputs: Inputs) -> Arm:
    """Two batched products, of factors that are gathered for each row."""
    As, Bs = (torch.stack(column).requires_grad_() for column in zip(*inputs.factors, strict=True))
    adapters = [adapter for (adapter,), count in inputs.case.rows for _ in range(count)]
    index, weight = torch.tensor(adapters, device=As.device), inputs.problem.weight

    def step(x: Tensor) -> Tensor:
        low = torch.bmm(x[:, None], As[index].transpose(1, 2))
        return F.linear(x, weight) + torch.bmm(SCALE * low, Bs[index].transpose(1, 2))[:, 0]

    return Arm(step, [As, Bs], lambda grads: (*grads[0], *grads[1]))


@dataclass
class _Level:
    """Groups of rows that have one adapter each, with the factors in stacks of padded ranks."""

    A: Tensor  # (groups, r, K)
    B: Tensor  # (groups, N, r)
    ends: Tensor
    adapters: list[int]

    @classmethod
    def make(cls, inputs: Inputs, level: int) -> "_Level":
        runs = [
            (adapter, sum(count for _, count in rows))
            for adapter, rows in groupby(inputs.case.rows, lambda each: each[0][level])
        ]
        K, N, r = inputs.case.K, inputs.case.N, -(-max(inputs.case.ranks) // 8) * 8
        device, dtype = inputs.problem.x.device, inputs.problem.x.dtype
        A, B = (torch.zeros(len(runs), *size, device=device, dtype=dtype) for size in ((r, K), (N, r)))
        for group, (adapter, _) in enumerate(runs):
            own_A, own_B = inputs.factors[adapter]
            A[group, : len(own_A)], B[group, :, : len(own_A)] = own_A, own_B
        ends = torch.tensor([count for _, count in runs], device=device).cumsum(0).to(torch.int32)
        return cls(A.requires_grad_(), B.requires_grad_(), ends, [adapter for adapter, _ in runs])

    def update(self, x: Tensor) -> Tensor:
        low = SCALE * torch._grouped_mm(x, self.A.transpose(1, 2), offs=self.ends)
        return torch._grouped_mm(low, self.B.transpose(1, 2), offs=self.ends)


def _grouped(inputs: Inputs) -> Arm:
    """torch's grouped products, two on each level; rows are sorted already."""
    case, weight = inputs.case, inputs.problem.weight
    levels = [_Level.make(inputs, level) for level in range(len(case.rows[0][0]))]

    def step(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        for level in levels:
            y = y + level.update(x)
        return y

    def unpack(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of stacks (A, B) of each level."""
        dAs, dBs = {}, {}
        for level, dA, dB in zip(levels, grads[::2], grads[1::2], strict=True):
            for group, adapter in enumerate(level.adapters):
                r = case.ranks[adapter]
                dAs[adapter], dBs[adapter] = dA[group, :r], dB[group, :, :r]
        return *(dAs[i] for i in sorted(dAs)), *(dBs[i] for i in sorted(dBs))

    return Arm(step, [stack for level in levels for stack in (level.A, level.B)], unpack)


def _peft_layer(inputs: Inputs) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential()
    model.add_module("linear", frozen_linear(inputs.problem))
    first, *others = [LoraConfig(r=r, lora_alpha=SCALE * r, target_modules=["linear"]) for r in inputs.case.ranks]
    model = get_peft_model(model, first, adapter_name="adapter_0")
    for i, config in enumerate(others, 1):
        model.add_adapter(f"adapter_{i}", config)
    layer = model.to(inputs.problem.x.dtype).eval().base_model.model.linear
    with torch.no_grad():
        for i, (A, B) in enumerate(inputs.factors):
            layer.lora_A[f"adapter_{i}"].weight.copy_(A)
            layer.lora_B[f"adapter_{i}"].weight.copy_(B)
    return layer


def _peft(accelerated: bool) -> Callable[[Inputs], Arm]:
    """Its own layer's adapter_names=, called directly; x in samples as long as the rows allow."""

    def make(inputs: Inputs) -> Arm:
        if inputs.case.has_sums:
            raise NotImplementedError("a sample of PEFT's has one adapter")
        layer, length = _peft_layer(inputs), math.gcd(*inputs.case.counts)
        reasons = accelerate(nn.Sequential(layer)).kept_by_name if accelerated else {}
        if reasons:
            raise NotImplementedError(f"left to PEFT: {', '.join(reasons.values())}")
        names = [f"adapter_{adapter}" for (adapter,), count in inputs.case.rows for _ in range(count // length)]

        def step(x: Tensor) -> Tensor:
            return layer(x.view(len(names), length, -1), adapter_names=names).flatten(0, 1)

        return Arm(step, trains=False)

    return make


ARMS: dict[str, tuple[str, Callable[[Inputs], Arm]]] = {
    FLOOR: ("frozen, no adapter (the floor)", _frozen),
    ONE: ("one adapter of the largest r", _one),
    PACKAGE: ("**fused_lora**, LoRABank and route", _ours),
    TRITON: ("fused_lora, Triton", _by_triton),
    GROUPED: ("torch._grouped_mm", _grouped),
    LOOP: ("a loop over adapters", _loop),
    GATHERED: ("bmm over gathered factors", _gathered),
    ACCELERATED: ("**PEFT's adapter_names, accelerated**", _peft(accelerated=True)),
    PEFT: ("PEFT's adapter_names", _peft(accelerated=False)),
}
