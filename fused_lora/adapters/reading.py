"""What a folder with an adapter holds, and what of it does not fit a model, in words."""

import re

import torch
from torch import Tensor, nn

from .. import checks
from ..modules.config import LoRAConfig, is_given_by
from ..modules.protocol import is_bank
from . import files
from .layers import modules_of

FACTOR = re.compile(re.escape(files.PREFIX) + r"(.+)\.(?:(lora_A|lora_B)\.weight|(lora_magnitude_vector))")
BIAS = re.compile(re.escape(files.PREFIX) + r"(?:(.+?)(?:\.base_layer)?\.)?bias")


def sort(
    tensors: dict[str, Tensor], use_dora: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(factors and magnitudes by layer and by their names there, biases by module, weights by key, what is wrong with
    factors)."""
    factors, biases, weights, errors = {}, {}, {}, []
    for key, tensor in tensors.items():
        factor, bias = FACTOR.fullmatch(key), BIAS.fullmatch(key)
        if not checks.computes_in(tensor.dtype):
            errors.append(f"{key} is {tensor.dtype}")
        elif factor:
            factors.setdefault(factor[1], {})[factor[2] or factor[3]] = tensor
        elif bias:
            biases[bias[1] or ""] = tensor
        else:
            weights[key] = tensor
    for name, pair in factors.items():
        wanted = files.tensors_of(use_dora)
        errors += [f"missing {files.key_of(name, which)}" for which in wanted if which not in pair]
        errors += [f"unexpected {files.key_of(name, which)}" for which in pair if which not in wanted]
    return factors, biases, weights, errors


def weight_errors(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """What the model has not just so: PEFT writes embeddings beside factors, that of a head with an adapter too."""
    modules, errors = modules_of(model), []
    for key, tensor in weights.items():
        name, _, which = key.removeprefix(files.PREFIX).replace(".base_layer.", ".").rpartition(".")
        own = getattr(modules.get(name), which, None)
        if not isinstance(own, nn.Parameter):
            errors.append(f"unexpected {key}")
        elif own.is_meta or own.shape != tensor.shape or not torch.equal(own.detach().to(tensor), tensor):
            errors.append(f"{key} is of another base: it is not the model's own")
    return errors


def missing(modules: dict[str, nn.Module], config: LoRAConfig, factors: dict) -> list[str]:
    """The keys of linears that the config names and the file has nothing of: the model is larger than the file's."""
    selection = config.selection
    if not selection.by_name or not factors:
        return []
    named = [
        name
        for name, module in modules.items()
        if (isinstance(module, nn.Linear) or is_bank(module)) and not selection.reason([name])
    ]
    wanted = files.tensors_of(config.use_dora)
    return [f"missing {files.key_of(name, which)}" for name in named if name not in factors for which in wanted]


def shape_errors(name: str, pair: dict[str, Tensor], r: int, weight: torch.Size) -> list[str]:
    wanted = {"lora_A": (r, weight[1]), "lora_B": (weight[0], r), files.MAGNITUDES: (weight[0],)}
    return [
        f"{files.key_of(name, which)} has the shape {tuple(tensor.shape)}, the model {wanted[which]}"
        for which, tensor in pair.items()
        if tensor.shape != wanted[which]
    ]


def exactly(names) -> str:
    """An expression for these names alone."""
    return "|".join(map(re.escape, names))


def of_any(names, pattern: dict) -> dict:
    """The entries that give one of the layers."""
    return {key: value for key, value in pattern.items() if any(is_given_by(name, key) for name in names)}
