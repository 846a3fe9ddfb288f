"""What of a state dict a layer cannot take."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from .. import checks

SCALES = ("weight_scale", "weight_outer")  # of a weight in a format
TENSORS = ("weight", *SCALES)  # as formats.Stored has them
MATRICES, MAGNITUDES = ("weight", "lora_A", "lora_B"), "lora_magnitude_vector"


def loading_errors(layer: nn.Module, state_dict, prefix: str) -> list[str]:
    """Why nothing of a state dict is loaded, since a part of it would leave the layer half of one state and half of
    another."""
    errors = base_errors(layer, state_dict, prefix)
    kept = {prefix + name for name in TENSORS} if layer.base is not None or errors else set()
    mine = {prefix + name: parameter for name, parameter in layer.named_parameters(recurse=False)}
    errors += [
        f"size mismatch for {key}: the checkpoint has {found}, the layer {own.shape}"
        for key, own in mine.items()
        if key in state_dict and key not in kept and (found := _shape_of(state_dict[key])) != own.shape
    ]
    wanted = [name for name in (*MATRICES, MAGNITUDES) if prefix + name in mine]
    given = [name for name in wanted if prefix + name in state_dict]
    state = state_dict.get(prefix + _EXTRA_STATE_KEY_SUFFIX)
    merged = (state is not None and says_merged(state)) if "weight" in given else layer.merged
    if merged and 0 < len(given) < len(wanted):
        whose = "the checkpoint's" if "weight" in given else "the layer's"
        errors.append(
            f"{_name_of(layer, prefix)}: {whose} weight is merged, and so is loaded with "
            f"{' and '.join(wanted[1:])} only, got {' and '.join(given)}: call unmerge_() first"
        )
    if layer.base is not None and not errors and merged and "weight" in given:
        errors += _bytes_errors(layer, prefix, state)
    return errors


def _bytes_errors(layer: nn.Module, prefix: str, state: Tensor) -> list[str]:
    """One where a merged weight comes without the bytes that unmerge_ needs."""
    size = sum(tensor.numel() * tensor.itemsize for tensor in layer.frozen_tensors() if tensor is not None)
    if state.dtype is torch.uint8 and state.shape == (size,):
        return []
    found = f"{str(state.dtype).removeprefix('torch.')} {tuple(state.shape)}"
    wanted = f"its _extra_state must be the {size} bytes of it before, got {found}"
    return [f"{_name_of(layer, prefix)}: the checkpoint's weight is merged, and {wanted}"]


def base_errors(layer: nn.Module, state_dict, prefix: str) -> list[str]:
    """One where the weight of a state dict is not kept as the layer keeps its own: a copy would cast codes, or take
    numbers for some."""
    given = {name: state_dict[prefix + name] for name in TENSORS if prefix + name in state_dict}
    if not given or (layer.base is None and _is_in_full(given)):
        return []
    own = {name: layer._parameters.get(name) for name in TENSORS}
    own = _described({name: tensor for name, tensor in own.items() if tensor is not None})
    found = _described(given)
    if found == own:
        return []
    base = "" if layer.base is None else f" of base {layer.base.name}"
    return [f"{_name_of(layer, prefix)}: the checkpoint has {_listed(found)}, the layer{base} {_listed(own)}"]


def _is_in_full(given: dict) -> bool:
    """Whether a weight is in no format, as far as can be seen; what is no tensor is reported by its size."""
    weight = given.get("weight")
    return not any(name in given for name in SCALES) and (
        not isinstance(weight, Tensor) or checks.computes_in(weight.dtype)
    )


def _described(tensors: dict) -> dict[str, str]:
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in tensors.items()
    }


def _listed(described: dict[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in described.items())


def _name_of(layer: nn.Module, prefix: str) -> str:
    return prefix.rstrip(".") or type(layer).__name__


def says_merged(state: Tensor) -> bool:
    """Of a layer's extra state: a bool, or the gain of a merged DoRA weight."""
    return state.dim() > 0 or bool(state)


def _shape_of(value) -> tuple[int, ...] | str:
    """What takes its place where it is no tensor."""
    return value.shape if isinstance(value, Tensor) else type(value).__name__
