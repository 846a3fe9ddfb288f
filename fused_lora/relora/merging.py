"""The merge of a model's layers, whole or in shards."""

import warnings

import torch
from torch import Tensor

from .. import checks
from ..formats import Arrived, Format, Stored
from ..ops import Part, merge_and_reinit_
from . import stored
from .shards import is_sharded, keep, local, whole


def tensors_of(name: str, part: Part) -> dict[str, Tensor]:
    """What a merge reads or writes of a layer, as parameters are called; of a weight in a format its codes."""
    weight = part.weight.codes if isinstance(part.weight, Stored) else part.weight
    return {f"{name}.lora_A": part.A, f"{name}.lora_B": part.B, f"{name}.weight": weight}


def check_mergeable(parts: dict[str, Part]) -> None:
    """Raises ValueError for what a merge would be lost in; and for factors that are not finite, on all ranks alike:
    merged, they would be in the weights for good."""
    for name, part in parts.items():
        for what, tensor in tensors_of(name, part).items():
            checks.check_own(what, tensor)
            checks.check_in_memory(what, tensor)
    factors = {f"{name}.lora_{which}": getattr(part, which) for name, part in parts.items() for which in "AB"}
    largest = torch._foreach_norm([local(factor.detach()) for factor in factors.values()], float("inf"))  # few launches
    finite = torch.stack([each.to(largest[0].device, torch.float64) for each in largest]).isfinite().int()
    if any(map(is_sharded, factors.values())):  # each rank has seen its own rows
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    wrong = [name for name, is_finite in zip(factors, finite.tolist(), strict=True) if not is_finite]
    if wrong:
        raise ValueError(f"{wrong[0]} must be finite to be merged, got an infinity or a NaN")


def merge_parts(
    parts: dict[str, Part], forms: dict[str, Format], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str
) -> dict[str, Arrived]:
    """Every layer's restart, and of weights in a format, whose formats are given, what arrived in them.

    Raises ValueError as check_mergeable does, and for sums that are not finite, before anything is merged.
    """
    check_mergeable(parts)
    merges = stored.prepare(parts, forms, seeds, lows, rounding)
    _merge_matrices({name: part for name, part in parts.items() if name not in merges}, seeds, lows, rounding)
    return stored.restart(merges, parts, seeds)


def _merge_matrices(parts: dict[str, Part], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str) -> None:
    """merge_and_reinit_ of those with low halves in one call, of those without in another."""
    for names in ([name for name in parts if name in lows], [name for name in parts if name not in lows]):
        some = [parts[name] for name in names]
        As = [whole(part.A) for part in some]
        merge_and_reinit_(
            [local(part.weight) for part in some],
            As,
            [local(part.B) for part in some],
            [part.scale for part in some],
            [seeds[name] for name in names],
            [lows[name] for name in names if name in lows] or None,
            rounding,
        )
        for part, A in zip(some, As, strict=True):
            if is_sharded(part.A):
                keep(part.A, A)


def warn_of_losses(arrived: dict[str, Arrived]) -> None:
    """Of the layer that has the least of its update, where that is little. Called last: a warning may be an error."""
    name = min(arrived, key=lambda name: arrived[name].share, default=None)
    if name is not None and arrived[name].share < checks.MUCH:
        words = checks.little_arrived(f"{name}'s update", arrived[name].share)
        warnings.warn(f"{words} (precision='residual' keeps it)", stacklevel=2)
