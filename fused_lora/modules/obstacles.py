"""Why a linear cannot be replaced: what a replacement would lose, cannot compute with, or would change elsewhere."""

import torch
from torch import Tensor, nn

from .. import checks
from . import quantised


def obstacle(linear: nn.Linear) -> str | None:
    """Why LoRALinear cannot stand for a linear, or None."""
    if hasattr(getattr(linear, "weight", None), "placements"):
        return "its weight is in shards: replace_linear comes before fully_shard and parallelize_module"
    found = quantised.read(linear)
    if isinstance(found, str):
        return found
    if type(linear) is not nn.Linear and found is None:
        return f"a subclass of nn.Linear ({type(linear).__name__})"
    if "_hf_hook" in vars(linear):
        return "accelerate brings its weight in at each call: replace_linear comes before cpu_offload or dispatch_model"
    lost = _lost(linear, quantised.HELD if found else set())
    if lost:
        return f"{lost}, which a replacement would lose"
    weight = found is None and _parameter_obstacle("weight", linear.weight, (linear.out_features, linear.in_features))
    if weight or linear.bias is None:
        return weight or None
    return _parameter_obstacle("bias", linear.bias, (linear.out_features,))


def _parameter_obstacle(name: str, parameter: Tensor | None, shape: tuple[int, ...]) -> str | None:
    if type(parameter) is not nn.Parameter:  # a subclass stands for a quantised or sharded weight
        return f"its {name} is a {type(parameter).__name__}, not a plain nn.Parameter"
    if parameter.layout is not torch.strided:
        return f"its {name} has the layout {parameter.layout}"
    if not checks.computes_in(parameter.dtype):
        return f"its {name} is {parameter.dtype}"
    if parameter.shape != shape:
        return f"its {name} has the shape {tuple(parameter.shape)} where {shape} is expected"
    return None


def _lost(linear: nn.Linear, held: set[str]) -> str | None:
    """What a linear has that nn.Linear has not; held: what one that is quantised has."""
    state = vars(linear)
    # Hooks of every kind, those of state dicts too: nn.Module keeps them in attributes that end so.
    hooks = {name for name, value in state.items() if name.endswith("_hooks") and value}
    if held:
        hooks -= {"_load_state_dict_pre_hooks"}  # bitsandbytes', which reads files of its own
    if hooks:
        return "it has hooks"
    replaced = [name for name in state if callable(getattr(nn.Linear, name, None))]
    if replaced:
        return f"its {replaced[0]} was replaced"
    tensors = state["_parameters"].keys() | state["_buffers"].keys()
    more = [*(tensors - {"weight", "bias"} - held), *state["_modules"]]
    return f"it holds {', '.join(sorted(more))}" if more else None


class Sharing:
    """Which tensors of a model lie, in part or whole, in the same memory: one Parameter, or several on one storage."""

    def __init__(self, model: nn.Module):
        self._spans: dict[tuple, list[tuple[int, int, str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    storage, start, end = _span(tensor)
                    self._spans.setdefault(storage, []).append((start, end, name, module))

    def obstacle(self, linear: nn.Linear) -> str | None:
        """The modules that share a parameter with a linear, or None."""
        for parameter_name, parameter in linear.named_parameters(recurse=False):
            storage, start, end = _span(parameter)
            others = {
                name
                for other_start, other_end, name, module in self._spans[storage]
                if module is not linear and other_start < end and start < other_end
            }
            if others:
                return f"its {parameter_name} is shared with {', '.join(sorted(others))}"
        return None


def _span(tensor: Tensor) -> tuple[tuple, int, int]:
    """A storage, and the bytes of it from a tensor's first element to its last."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.numel() == 0:
        return ("tensor", id(tensor)), 0, 1
    storage = tensor.untyped_storage()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset()
    key = (tensor.device, storage.data_ptr() or storage._cdata)  # on meta there is no memory
    return key, start * tensor.element_size(), (start + reach + 1) * tensor.element_size()
