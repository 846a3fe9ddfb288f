"""What the first cycle of a run begins with."""

import torch

from .. import reference
from ..formats import Stored
from ..modules.protocol import LoRALayer
from ..ops import Part
from .shards import keep, local, whole


def check_forgets(layers: dict[str, LoRALayer], base: str) -> None:
    """Raises ValueError for weights that cannot be begun from zero."""
    for name, layer in layers.items():
        if base != "trained" and isinstance(layer.lora_part().weight, Stored):
            raise ValueError(f"base={base!r} forgets the weights, and {name}'s is quantised: base must be 'trained'")


def begin(part: Part, seed: int, base: str) -> None:
    """The first factors, by the counter as all others: torch's own generator differs between ranks."""
    weight, (out_features, in_features) = local(part.weight), part.weight.shape
    seed = torch.tensor(seed, device=weight.device)
    if not whole(part.B).any():  # else the layer has begun already
        keep(part.A, reference.new_A(part.r, in_features, seed))
    if base != "trained":
        weight.zero_()
        keep(part.B, reference.uniform(out_features, part.r, part.r**-0.5, seed + 1))
