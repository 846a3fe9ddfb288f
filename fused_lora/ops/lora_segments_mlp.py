"""The gated MLP of LoRA linears, each row by an adapter of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, choices, reference, segments
from . import parts as of_parts
from . import segmented
from .alone import like, rows_of
from .autograd import distinct, needs_formula, partials, watched
from .library import ops
from .lora_mlp import PARTS, checked
from .lora_segments import Call, Routed, check, complete, gradients, lora_segments, read_again, run, saved
from .parts import Part

_DOWN = 2 * segmented.TENSORS  # where its tables begin


class LoRASegmentsMLPFunction(torch.autograd.Function):
    """Two passes each way, as LoRAMLPFunction's, of slabs, as LoRASegmentsFunction's."""

    @staticmethod
    def forward(ctx, x, layout, window, act, save, *tensors):
        call, keep = Call.of(tensors, layout, window), "factors" if save == "all" else "sides"
        hidden, first, second, *xas = run(x, call.parts[:2], call.tables[:_DOWN], window, act, keep)
        y, xa = run(hidden, call.parts[2:], call.tables[_DOWN:], window)
        ctx.layout, ctx.window, ctx.act = layout, window, act
        kept = hidden if keep == "factors" else None
        ctx.save_for_backward(x, first, second, kept, *xas, xa, *saved(ctx, call).tensors())
        return like(y, x)

    @staticmethod
    def backward(ctx, dy):
        layout, window, act = ctx.layout, ctx.window, ctx.act
        x, first, second, hidden, *rest = ctx.saved_tensors
        xas, call = rest[: len(PARTS)], Call.of(rest[len(PARTS) :], layout, window)
        need_dx, _, _, _, _, *needs = ctx.needs_input_grad
        if not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        if needs_formula([dy]):
            formula = lambda x, *tensors: [_by_formula(x, Call.of(tensors, layout, window), act)]  # noqa: E731
            dx, *grads = partials(formula, [dy], (x, *call.tensors()), (need_dx, *needs))
            return dx, None, None, None, None, *grads
        call, dy, rows, factors = read_again(ctx, call), rows_of(dy), rows_of(x), hidden is not None
        dgate, dup, again, dxa = ops.lora_parts_backward(
            [dy], [first], of_parts.flatten(call.parts[2:]), xas[2:], [None], 0.0, True, [False] * 3, act,
            [first, second], factors, [], call.tables[_DOWN:], window,
        )  # fmt: skip
        # What is summed over tokens belongs together, down's too.
        xs = [rows, rows, hidden if factors else again]
        needs = Call.of(needs, layout, window)
        dx, grads = gradients([dgate, dup, dy], xs, xas, [None, None, dxa], call, need_dx, needs)
        return dx.view(x.shape) if need_dx else None, None, None, None, None, *grads.tensors()


def _by_formula(x: Tensor, call: Call, act: Sequence[float]) -> Tensor:
    """In plain torch, in x's dtype."""
    hidden = reference.gated(call.part_by_formula(0, x), call.part_by_formula(1, x), *act)
    return call.part_by_formula(2, hidden)


def lora_segments_mlp(
    x: Tensor, gate: Routed, up: Routed, down: Routed, activation: str = "silu", save: str = "all"
) -> Tensor:
    """y = down(act(gate(x)) up(x)), all three of them lora_segments of the same rows.

        x (..., K)   weights of gate and up (F, K), of down (N, F)   ->   y (..., N)

    As in lora_mlp, for windows of up to 128 ranks act(gate) up is made, and differentiated, in the launches of the
    products beside it on Hopper; save is what it is there. Elsewhere the three are computed one after another.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. Gated MLPs: Shazeer 2020, arXiv:2002.05202.
    """
    act, routed = checked(activation, save), [gate, up, down]
    x, parts = of_parts.autocast(x, [each.part for each in routed])
    for i in range(2):
        check(x, parts[i], routed[i].tables, PARTS[i])
    checks.check_same_rows("up", parts[1].weight, "gate", parts[0].weight)
    hidden = x.new_empty(1).expand(*x.shape[:-1], parts[0].weight.shape[0])
    check(hidden, parts[2], down.tables, PARTS[2])
    if not _is_one(x, hidden, parts, routed):
        sides = lora_segments(x, [gate, up])
        return lora_segments(reference.gated(*sides, *act), [down])[0]
    parts, tables, window = complete(x, parts, routed)
    if watched():
        return _by_formula(x, Call.of_routed(parts, tables, routed), act)
    if torch.is_grad_enabled():
        call = Call.of_routed(parts, tables, routed)
        if call.trains(x):
            return LoRASegmentsMLPFunction.apply(x, call.layout, window, act, save, *distinct(x, call.tensors()))
    hidden, *_ = run(x, parts[:2], tables[:_DOWN], window, act)
    return like(run(hidden, parts[2:], tables[_DOWN:], window)[0], x)


def obstacle(device: torch.device, dtype: torch.dtype, routed: Sequence[Routed]) -> str | None:
    """Why gate, up and down of an x of a dtype are not csrc's gated passes, or None."""
    each = [segmented.of_routed(of) for of in routed]
    return segmented.obstacle(device, dtype, [of.part for of in routed], each, True)


def _is_one(x: Tensor, hidden: Tensor, parts: Sequence[Part], routed: Sequence[Routed]) -> bool:
    """Whether csrc has it, or plain torch computes all three."""
    each = [segmented.of_routed(of) for of in routed]
    if segmented.in_csrc(x, parts, each, True):
        return True
    return all(segmented.backend(*of_part) == "reference" for of_part in zip((x, x, hidden), parts, each, strict=True))


def obstacle_of_banks(device: torch.device, dtype: torch.dtype, drops: bool) -> str | None:
    """Why no route through three banks makes them csrc's gated passes for an x of a dtype, or None; drops: whether
    adapters drop now. It takes less time than to ask what a route says."""
    choice = choices.choose_segments(device, dtype, segments.BOX, True, drops)
    return choice.reason if choice.name != "cuda" else choices.gated_segments_obstacle(device, segments.BOX, drops)
