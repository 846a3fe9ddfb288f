"""What of a state dict a layer cannot take."""

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

MATRICES = ("weight", "lora_A", "lora_B")


def loading_errors(layer: nn.Module, state_dict, prefix: str) -> list[str]:
    """Why nothing of a state dict is loaded, since a part of it would leave the layer half of one state and half of
    another."""
    mine = {prefix + name: parameter for name, parameter in layer.named_parameters(recurse=False)}
    errors = [
        f"size mismatch for {key}: the checkpoint has {found}, the layer {own.shape}"
        for key, own in mine.items()
        if key in state_dict and (found := _shape_of(state_dict[key])) != own.shape
    ]
    given = [name for name in MATRICES if prefix + name in state_dict]
    merged = state_dict.get(prefix + _EXTRA_STATE_KEY_SUFFIX, False) if "weight" in given else layer.merged
    if merged and 0 < len(given) < len(MATRICES):
        whose = "the checkpoint's" if "weight" in given else "the layer's"
        errors.append(
            f"{prefix.rstrip('.') or type(layer).__name__}: {whose} weight is merged, and so is loaded with both "
            f"factors only, got {' and '.join(given)}: call unmerge_() first"
        )
    return errors


def _shape_of(value) -> tuple[int, ...] | str:
    """What takes its place where it is no tensor."""
    return value.shape if isinstance(value, Tensor) else type(value).__name__
