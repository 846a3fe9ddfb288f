"""The merge of a model's layers, whole or in shards."""

from torch import Tensor

from ..modules import LoRALinear
from ..ops import merge_and_reinit_
from .shards import is_sharded, keep, local, whole


def merge_layers(layers: dict[str, LoRALinear], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str) -> None:
    """merge_and_reinit_ of all layers: those with low halves in one call, those without in another."""
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
