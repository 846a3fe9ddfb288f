"""What torch.utils.flop_counter counts of the ops. Registered late: importing it would import Triton."""

import math
from functools import cache

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .. import backends
from .library import ops
from .parts import columns, unflatten


def _sizes(parts: list) -> list[tuple[int, int, int]]:
    """(K, N, r) of each; of tensors the counter shows shapes."""
    return [(part.weight[1], part.weight[0], part.A[0]) for part in unflatten(parts)]


def _forward(x, parts, *_, **__) -> int:
    M = math.prod(x[:-1])
    return sum(2 * M * (K * N + r * (K + N)) for K, N, r in _sizes(parts))


def _backward(dys, xs, parts, xas, dxas, p, need_dx, needs, *_, **__) -> int:
    M = math.prod(xs[0][:-1])
    need_dAs, need_dBs, _ = columns(needs, len(dys))
    total = 0
    for (K, N, r), dxa, need_dA, need_dB in zip(_sizes(parts), dxas, need_dAs, need_dBs, strict=True):
        summed = need_dx and dxa is None
        makes_dxa = dxa is None and (need_dx or need_dA)
        total += 2 * M * (summed * K * (N + r) + makes_dxa * r * N + need_dA * r * K + need_dB * r * N)
    return total


@cache
def register() -> dict:
    """The formulas by op, those of every counter that begins after this."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    pairs = {ops.lora_parts_forward: _forward, ops.lora_parts_backward: _backward}
    if backends.has_extension():
        pairs |= {ops.cuda_lora_parts_forward: _forward, ops.cuda_lora_parts_backward: _backward}
    for op, formula in pairs.items():
        register_flop_formula(op)(formula)
    return {op: flop_registry[op] for op in pairs}


def show() -> None:
    """To counters that have begun already."""
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry |= register()
