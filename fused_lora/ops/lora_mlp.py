"""The gated MLP of LoRA linears: act(gate) up is made and differentiated where its factors are computed."""

import torch
from torch import Tensor

from .. import checks, reference
from . import eager, recomputed
from . import parts as of_parts
from .alone import like, rows_of
from .autograd import (
    by_formula,
    distinct,
    in_plain_torch,
    mlp,
    needs_formula,
    of_inputs,
    read_for_gains,
    wanted_of,
    wanted_ys,
)
from .library import ops
from .parts import Part, flatten, unflatten

SAVE = ("all", "less")
PARTS = ("gate", "up", "down")


class LoRAMLPFunction(torch.autograd.Function):
    """Both passes are two: of gate and up, which end in act(gate) up, and of down; backward down's comes first.

    Of gains the backward pass needs what they made: gate and up themselves, and y.
    """

    @staticmethod
    def forward(ctx, x, p, act, save, *flat):
        y, _ = _forward(ctx, x, p, act, save, flat, _down)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, first, second, hidden, *rest = ctx.saved_tensors
        xas, y, parts = rest[: len(PARTS)], rest[len(PARTS)], unflatten(rest[len(PARTS) + 1 :])
        need_dx, _, _, _, *flat_needs = ctx.needs_input_grad
        if not any(ctx.needs_input_grad):
            return (None,) * len(ctx.needs_input_grad)
        if needs_formula([dy]):
            formula = lambda x, parts: [mlp(x, parts, ctx.p, ctx.act)]  # noqa: E731
            dx, _, *grads = by_formula(formula, [dy], x, parts, need_dx, flat_needs)
            return dx, None, None, None, *grads
        needs, factors = unflatten(flat_needs), hidden is not None
        dy, rows = rows_of(dy), rows_of(x)
        dgate, dup, again, dxa = ops.lora_parts_backward(
            [dy], [first], flatten(parts[2:]), xas[2:], [None], ctx.p, True, [False] * 3, ctx.act, [first, second],
            factors, [],
        )  # fmt: skip
        # What is summed over tokens belongs together, down's too.
        wanted, ys = wanted_of(needs), wanted_ys([first, second, y], needs)
        xs = [rows, rows, hidden if factors else again]
        dx, *grads = ops.lora_parts_backward(
            [dgate, dup, dy], xs, flatten(parts), xas, [None, None, dxa], ctx.p, need_dx, wanted, [], [], False, ys
        )
        grads = flatten(of_inputs(grads, wanted, ys))
        return dx.view(x.shape) if need_dx else None, None, None, None, *grads


class _SavedFirst(LoRAMLPFunction):
    """The same in a checkpoint's second pass, which may stop before the result."""

    @staticmethod
    def forward(ctx, x, p, act, save, *flat):
        stand_in, ctx.hidden = _forward(ctx, x, p, act, save, flat, recomputed.stand_in_and_low)
        return stand_in


def _forward(ctx, x, p, act, save, flat, of_down) -> tuple[Tensor, Tensor]:
    """(y, act(gate) up); of_down(hidden, part, p) gives y and its xa."""
    parts = unflatten(flat)
    has_gains = any(part.gain is not None for part in parts[:2])
    keep = "factors" if save == "all" and not has_gains else "sides"
    hidden, first, second, *xas = ops.lora_parts_forward(x, flatten(parts[:2]), p, act, keep)
    y, xa = of_down(hidden, parts[2], p)
    kept = hidden if keep == "factors" else None
    ctx.save_for_backward(x, first, second, kept, *xas, xa, *read_for_gains([y], parts[2:]), *flat)
    ctx.p, ctx.act = p, act
    return like(y, x), hidden


def _down(hidden: Tensor, part: Part, p: float) -> list[Tensor]:
    """y and xa."""
    return ops.lora_parts_forward(hidden, flatten([part]), p, [], "none")


def _again(x: Tensor, parts: list[Part], p: float, act, save: str) -> Tensor:
    """By _SavedFirst."""
    stand_in = _SavedFirst.apply(x, p, act, save, *flatten(parts))
    hidden = stand_in.grad_fn.hidden
    del stand_in.grad_fn.hidden
    return recomputed.result(stand_in, lambda: like(_down(hidden, parts[2], p)[0], x))


def checked(activation: str, save: str) -> tuple[float, float]:
    """The activation's numbers. ValueError for what is none of either."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    if save not in SAVE:
        raise ValueError(f"save must be one of {', '.join(SAVE)}, got {save!r}")
    return reference.ACTIVATIONS[activation]


def lora_mlp(
    x: Tensor,
    gate: Part,
    up: Part,
    down: Part,
    activation: str = "silu",
    p: float = 0.0,
    seed: Tensor | None = None,
    save: str = "all",
) -> Tensor:
    """y = down(act(gate(x)) up(x)), all three of them lora_linear.

        x (..., K)   gate and up (F, K), down (N, F) with factors of their own ranks   ->   y (..., N)

    activation is "silu" or "gelu_tanh". All else as in lora_linear; gate and up drop the same entries of x (seed), down
    those of its own input (seed + 2^32). On Hopper, for ranks up to 128, the product act(gate) up is made in the launch
    that computes gate and up, and its gradient becomes theirs in the launch that computes it, without being stored.

    Saves x, the product, and what its gradient is to be multiplied by: act(gate(x)) and act'(gate(x)) up(x). With
    save="less", or gains, it saves x, gate(x) and up(x), and the backward pass computes the others again.

    Raises ValueError or TypeError naming the argument.
    LoRA: Hu et al. 2021, arXiv:2106.09685. Gated MLPs: Shazeer 2020, arXiv:2002.05202.
    """
    act = checked(activation, save)
    x, parts = of_parts.autocast(x, [gate, up, down])
    again = down.gain is None and recomputed.is_worth(x, down.weight)
    y = None if again else eager.mlp(x, parts, p, seed, act, save)
    if y is not None:  # else something is wrong, or for another backend
        return y
    of_parts.check(x, parts[:2], p, seed, PARTS[:2])
    checks.check_same_rows("up", parts[1].weight, "gate", parts[0].weight)
    of_parts.check(x.new_empty(0, parts[0].weight.shape[0]), parts[2:], p, seed, PARTS[2:])
    seed = of_parts.drawn_seed(x, p, seed)
    down_seed = None if seed is None else seed + reference.DOWN_SEED
    parts = [*of_parts.complete(x, parts[:2], seed), *of_parts.complete(x, parts[2:], down_seed)]
    if in_plain_torch(parts):
        return mlp(x, parts, p, act)
    if of_parts.trains(x, parts):
        if again:
            return _again(x, parts, p, act, save)
        return LoRAMLPFunction.apply(x, p, act, save, *distinct(x, flatten(parts)))
    hidden, *_ = ops.lora_parts_forward(x, flatten(parts[:2]), p, act, "none")
    return like(_down(hidden, parts[2], p)[0], x)
