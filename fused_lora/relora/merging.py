"""The merge of a model's layers, whole or in shards."""

import torch
from torch import Tensor

from ..modules import LoRALinear
from ..ops import merge_and_reinit_
from .shards import is_sharded, keep, local, whole


def check_finite(layers: dict[str, LoRALinear]) -> None:
    """Raises ValueError for factors that are not, on all ranks alike: merged, they would be in the weights for good."""
    factors = {
        f"{name}.{which}": getattr(layer, which) for name, layer in layers.items() for which in ("lora_A", "lora_B")
    }
    largest = torch._foreach_norm([local(factor.detach()) for factor in factors.values()], float("inf"))  # few launches
    finite = torch.stack([each.to(largest[0].device, torch.float64) for each in largest]).isfinite().int()
    if any(map(is_sharded, factors.values())):  # each rank has seen its own rows
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    wrong = [name for name, is_finite in zip(factors, finite.tolist(), strict=True) if not is_finite]
    if wrong:
        raise ValueError(f"{wrong[0]} must be finite to be merged, got an infinity or a NaN")


def merge_layers(layers: dict[str, LoRALinear], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str) -> None:
    """merge_and_reinit_ of all layers: those with low halves in one call, those without in another.

    Raises ValueError naming a factor that is not finite, before anything is merged.
    """
    check_finite(layers)
    for names in ([name for name in layers if name in lows], [name for name in layers if name not in lows]):
        some = [layers[name] for name in names]
        As = [whole(layer.lora_A) for layer in some]
        merge_and_reinit_(
            [local(layer.weight) for layer in some],
            As,
            [local(layer.lora_B) for layer in some],
            [layer.scale for layer in some],
            [seeds[name] for name in names],
            [lows[name] for name in names if name in lows] or None,
            rounding,
        )
        for layer, A in zip(some, As, strict=True):
            if is_sharded(layer.lora_A):
                keep(layer.lora_A, A)
