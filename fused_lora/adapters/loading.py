"""load_adapter: an adapter's files into a model, which gets LoRALinear layers where it has none."""

import dataclasses
import os
import re
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checks
from ..modules import LoRALinear, ReplaceReport
from ..modules.config import LoRAConfig, is_given_by, remember, served
from ..modules.replace import convert
from ..modules.selection import Selection
from ..modules.targets import find_linears
from . import files
from .layers import bare, layers_of, modules_of

FACTOR = re.compile(re.escape(files.PREFIX) + r"(.+)\.(?:(lora_A|lora_B)\.weight|(lora_magnitude_vector))")
BIAS = re.compile(re.escape(files.PREFIX) + r"(?:(.+?)(?:\.base_layer)?\.)?bias")


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> ReplaceReport | None:
    """Reads adapter_config.json and adapter_model.safetensors, of save_adapter or of PEFT, into a model.

        base_model.model.<path>.lora_A.weight (r, K), .lora_B.weight (N, r), of DoRA .lora_magnitude_vector (N,), and
        biases where the file has them; from an injected model also without base_model.model. Weights of the base that
        PEFT writes beside them (embeddings) must be the model's.

    A model without LoRALinear layers gets them where the file has factors, with the config's dropout, all but the
    update frozen, and factors in a dtype that holds the file's and the weights'; the report of that is returned. A
    model that has such layers keeps them, with their dtype and dropout: the file must have factors for each of them, of
    their rank; r, lora_alpha and use_rslora of the config give their scale. All fields of the config are kept for
    save_adapter.

    Raises ValueError, with nothing changed, for a folder without both files, a config with fields that are not served
    (lora_bias, modules_to_save, and so on), merged layers, and, in one error that lists them all, for keys
    that are missing or unexpected and tensors of other shapes than the model's; ImportError without safetensors.
    """
    model = bare(model)
    given, tensors = files.read(Path(folder))
    config = served(given)
    factors, biases, weights, errors = _sorted(tensors, config.use_dora)
    errors += _weight_errors(model, weights)
    layers, report = layers_of(model), None
    if not layers:
        errors += _replacing_errors(model, config, factors)
    else:
        errors += _layer_errors(layers, config, factors)
    targets, bias_errors = _bias_targets(model, biases)
    if errors or bias_errors:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(errors + bias_errors))
    if not layers:
        report = _replace(model, config, factors)
        layers = layers_of(model)
    for name, layer in layers.items():
        layer.use_rslora, layer.lora_alpha = config.use_rslora, config.of(name)[1]
    _copy(layers, factors, targets)
    remember(model, given)
    return report


def _sorted(
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


def _weight_errors(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
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


def _layer_errors(layers: dict[str, LoRALinear], config: LoRAConfig, factors: dict) -> list[str]:
    """What of a file does not fit layers."""
    errors = [f"{name} is merged: unmerge_() it first" for name, layer in layers.items() if layer.merged]
    for name in sorted(layers.keys() - factors.keys()):
        errors += [f"missing {files.key_of(name, which)}" for which in files.tensors_of(config.use_dora)]
    for name, pair in factors.items():
        if name not in layers:
            errors.append(f"unexpected {', '.join(files.key_of(name, which) for which in pair)}: no LoRALinear there")
            continue
        layer = layers[name]
        errors += _shape_errors(name, pair, layer.r, layer.weight.shape)
        if config.use_dora != layer.use_dora:
            errors.append(f"{name} has use_dora={layer.use_dora}, the config says use_dora={config.use_dora}")
        if config.of(name)[0] != layer.r:
            errors.append(f"{name} has r={layer.r}, the config says r={config.of(name)[0]}")
    return errors


def _replacing_errors(model: nn.Module, config: LoRAConfig, factors: dict) -> list[str]:
    """What of a file does not fit the linears that its layers would replace."""
    modules, errors = modules_of(model), []
    for name, pair in factors.items():
        linear = modules.get(name)
        if isinstance(linear, nn.Linear) and linear.weight.is_meta:
            errors.append(f"{name} is on meta: bring back what is offloaded first")
        elif isinstance(linear, nn.Linear):
            errors += _shape_errors(name, pair, config.of(name)[0], linear.weight.shape)
        else:
            found = "no such module" if linear is None else f"a {type(linear).__name__}"
            errors.append(f"unexpected {', '.join(files.key_of(name, which) for which in pair)}: {found} there")
    errors += _missing(modules, config, factors)
    if errors or not factors:
        return errors or ["it has no factors"]
    report, _ = find_linears(model, Selection(_exactly(factors)))
    return [f"{name} cannot be replaced: {report.skipped[name]}" for name in factors if name not in report.replaced]


def _missing(modules: dict[str, nn.Module], config: LoRAConfig, factors: dict) -> list[str]:
    """The keys of linears that the config names and the file has nothing of: the model is larger than the file's."""
    selection = config.selection
    if not selection.by_name or not factors:
        return []
    named = [name for name, module in modules.items() if isinstance(module, nn.Linear) and not selection.reason([name])]
    wanted = files.tensors_of(config.use_dora)
    return [f"missing {files.key_of(name, which)}" for name in named if name not in factors for which in wanted]


def _shape_errors(name: str, pair: dict[str, Tensor], r: int, weight: torch.Size) -> list[str]:
    wanted = {"lora_A": (r, weight[1]), "lora_B": (weight[0], r), files.MAGNITUDES: (weight[0],)}
    return [
        f"{files.key_of(name, which)} has the shape {tuple(tensor.shape)}, the model {wanted[which]}"
        for which, tensor in pair.items()
        if tensor.shape != wanted[which]
    ]


def _bias_targets(model: nn.Module, biases: dict[str, Tensor]) -> tuple[dict[Tensor, Tensor], list[str]]:
    """(the file's bias of each parameter, what does not fit, in words)."""
    modules, targets, errors = modules_of(model), {}, []
    for name, tensor in biases.items():
        bias = getattr(modules.get(name), "bias", None)
        if not isinstance(bias, nn.Parameter):
            errors.append(f"unexpected bias of {name}: none there")
        elif bias.shape != tensor.shape:
            errors.append(f"the bias of {name} has the shape {tuple(tensor.shape)}, the model {tuple(bias.shape)}")
        else:
            targets[bias] = tensor
    return targets, errors


def _exactly(names) -> str:
    """An expression for these names alone."""
    return "|".join(map(re.escape, names))


def _replace(model: nn.Module, config: LoRAConfig, factors: dict[str, dict[str, Tensor]]) -> ReplaceReport:
    """LoRALinear in the place of the linears that the file has factors for."""
    config = dataclasses.replace(
        config, target_modules=_exactly(factors), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        rank_pattern=_of_any(factors, config.rank_pattern), alpha_pattern=_of_any(factors, config.alpha_pattern),
    )  # fmt: skip
    dtypes = {tensor.dtype for pair in factors.values() for tensor in pair.values()}
    dtypes |= {model.get_submodule(name).weight.dtype for name in factors}
    return convert(model, config, lora_dtype=reduce(torch.promote_types, dtypes), freeze=True)


def _of_any(names, pattern: dict) -> dict:
    """The entries that give one of the layers."""
    return {key: value for key, value in pattern.items() if any(is_given_by(name, key) for name in names)}


@torch.no_grad()
def _copy(layers: dict[str, LoRALinear], factors: dict[str, dict[str, Tensor]], biases: dict[Tensor, Tensor]) -> None:
    for name, layer in layers.items():
        for which, tensor in factors[name].items():
            getattr(layer, which).copy_(tensor)
    for parameter, tensor in biases.items():
        parameter.copy_(tensor)
