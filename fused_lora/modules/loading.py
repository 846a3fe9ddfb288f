"""What of a state dict a layer cannot take."""

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

MATRICES, MAGNITUDES = ("weight", "lora_A", "lora_B"), "lora_magnitude_vector"


def loading_errors(layer: nn.Module, state_dict, prefix: str) -> list[str]:
    """Why nothing of a state dict is loaded, since a part of it would leave the layer half of one state and half of
    another."""
    mine = {prefix + name: parameter for name, parameter in layer.named_parameters(recurse=False)}
    errors = [
        f"size mismatch for {key}: the checkpoint has {found}, the layer {own.shape}"
        for key, own in mine.items()
        if key in state_dict and (found := _shape_of(state_dict[key])) != own.shape
    ]
    wanted = [name for name in (*MATRICES, MAGNITUDES) if prefix + name in mine]
    given = [name for name in wanted if prefix + name in state_dict]
    state = state_dict.get(prefix + _EXTRA_STATE_KEY_SUFFIX)
    merged = (state is not None and says_merged(state)) if "weight" in given else layer.merged
    if merged and 0 < len(given) < len(wanted):
        whose = "the checkpoint's" if "weight" in given else "the layer's"
        errors.append(
            f"{prefix.rstrip('.') or type(layer).__name__}: {whose} weight is merged, and so is loaded with "
            f"{' and '.join(wanted[1:])} only, got {' and '.join(given)}: call unmerge_() first"
        )
    return errors


def says_merged(state: Tensor) -> bool:
    """Of a layer's extra state: a bool, or the gain of a merged DoRA weight."""
    return state.dim() > 0 or bool(state)


def _shape_of(value) -> tuple[int, ...] | str:
    """What takes its place where it is no tensor."""
    return value.shape if isinstance(value, Tensor) else type(value).__name__
