"""The merge of a model's layers, whole or in shards."""

import torch
from torch import Tensor

from .. import checks
from ..ops import Part, merge_and_reinit_
from .shards import is_sharded, keep, local, whole


def check_finite(parts: dict[str, Part]) -> None:
    """Raises ValueError for factors that are not, on all ranks alike: merged, they would be in the weights for good."""
    factors = {f"{name}.lora_{which}": getattr(part, which) for name, part in parts.items() for which in "AB"}
    for name, part in parts.items():
        for what, tensor in (("weight", part.weight), ("lora_A", part.A), ("lora_B", part.B)):
            checks.check_own(f"{name}.{what}", tensor)
    for name, factor in factors.items():
        if factor.is_meta:
            raise ValueError(
                f"{name} must be in memory to be merged, got one on meta: bring back what is offloaded first"
            )
    largest = torch._foreach_norm([local(factor.detach()) for factor in factors.values()], float("inf"))  # few launches
    finite = torch.stack([each.to(largest[0].device, torch.float64) for each in largest]).isfinite().int()
    if any(map(is_sharded, factors.values())):  # each rank has seen its own rows
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    wrong = [name for name, is_finite in zip(factors, finite.tolist(), strict=True) if not is_finite]
    if wrong:
        raise ValueError(f"{wrong[0]} must be finite to be merged, got an infinity or a NaN")


def merge_parts(parts: dict[str, Part], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str) -> None:
    """merge_and_reinit_ of all layers' parts: those with low halves in one call, those without in another.

    Raises ValueError naming a factor that is not finite, before anything is merged.
    """
    check_finite(parts)
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
