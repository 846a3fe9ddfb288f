"""The weights of a checkpoint with all that its run keeps beside them: low halves, and factors within a cycle."""

from pathlib import Path

from torch import Tensor

from ..reference import join
from . import checkpoint


def merged_weights(place: Path) -> tuple[dict[str, Tensor], dict]:
    """(the model's tensors by the names that they have in a plain model, the rest of the checkpoint).

    What has a low half or factors is in float32, the rest as it was saved.
    """
    tensors, state = checkpoint.load(place)
    lows = (state["relora"] or {}).get("lows", {})
    scale = float(state["options"]["lora_alpha"]) / float(state["options"]["r"])
    merged = {}
    for name in (name for name in tensors if name.endswith(".weight")):
        layer, weight = name.removesuffix(".weight"), tensors[name]
        if layer in lows:
            weight = join(weight, lows[layer])
        if f"{layer}.lora_B" in tensors and not tensors.get(f"{layer}._extra_state", False):  # else it is in there
            weight = weight.float() + scale * tensors[f"{layer}.lora_B"].float() @ tensors[f"{layer}.lora_A"].float()
        merged[name] = weight
    return merged, state


def newest(folder: Path) -> Path:
    """The last checkpoint in a folder; ValueError if it has none."""
    found = checkpoint.checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} has no checkpoint")
    return found[-1]
