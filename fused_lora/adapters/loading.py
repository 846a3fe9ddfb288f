"""load_adapter: an adapter's files into a model, which gets LoRALinear layers where it has none."""

import dataclasses
import os
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from ..modules import LoRALinear, ReplaceReport
from ..modules.config import LoRAConfig, remember, served
from ..modules.quantised import size_and_dtype
from ..modules.replace import convert
from ..modules.routing import check_name
from ..modules.selection import Selection
from ..modules.targets import find_linears
from . import banks, files
from .layers import bare, layers_of, modules_of
from .reading import exactly, missing, of_any, shape_errors, sort, weight_errors


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, name: str | None = None, lora_dtype: torch.dtype | None = None
) -> ReplaceReport | None:
    """Reads adapter_config.json and adapter_model.safetensors, of save_adapter or of PEFT, into a model.

        base_model.model.<path>.lora_A.weight (r, K), .lora_B.weight (N, r), of DoRA .lora_magnitude_vector (N,), and
        biases where the file has them; from an injected model also without base_model.model. Weights of the base that
        PEFT writes beside them (embeddings) must be the model's.

    A model without LoRALinear layers gets them where the file has factors, with the config's dropout, all but the
    update frozen, and factors in a dtype that holds the file's and the weights'; the report of that is returned. A
    model that has such layers keeps them, with their dtype and dropout: the file must have factors for each of them, of
    their rank; r, lora_alpha and use_rslora of the config give their scale. All fields of the config are kept for
    save_adapter.

    With a name, it becomes an adapter of LoRABank layers (add_adapter), beside others that the model has; one that the
    model has by this name gets the file's values. New banks have factors in lora_dtype, which the default chooses as
    above, others keep their own.

    Raises ValueError, with nothing changed, for a folder without both files, a config with fields that are not served
    (lora_bias, modules_to_save, and so on), merged layers, and, in one error that lists them all, for keys
    that are missing or unexpected and tensors of other shapes than the model's; ImportError without safetensors.
    """
    model = bare(model)
    given, tensors = files.read(Path(folder))
    config = served(given)
    factors, biases, weights, errors = sort(tensors, config.use_dora)
    errors += weight_errors(model, weights)
    if name is not None or banks.has_banks(model):
        errors += banks.errors_of(model, _checked(name), config, factors, biases, lora_dtype)
        _raise_if_any(errors, folder)
        report = banks.load(model, name, config, factors, lora_dtype)
        remember(model, given, name)
        return report
    layers, report = layers_of(model), None
    if not layers:
        errors += _replacing_errors(model, config, factors)
    else:
        errors += _layer_errors(layers, config, factors)
    targets, bias_errors = _bias_targets(model, biases)
    _raise_if_any(errors + bias_errors, folder)
    if not layers:
        report = _replace(model, config, factors)
        layers = layers_of(model)
    for name, layer in layers.items():
        layer.use_rslora, layer.lora_alpha = config.use_rslora, config.of(name)[1]
    _copy(layers, factors, targets)
    remember(model, given)
    return report


def _checked(name: str | None) -> str:
    if name is None:
        raise ValueError("name must be given of a model with LoRABank layers: that of the adapter")
    check_name("name", name)
    return name


def _raise_if_any(errors: list[str], folder: str | os.PathLike) -> None:
    if errors:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(errors))


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
        errors += shape_errors(name, pair, layer.r, layer.frozen_weight.shape)
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
            errors += shape_errors(name, pair, config.of(name)[0], size_and_dtype(linear)[0])
        else:
            found = "no such module" if linear is None else f"a {type(linear).__name__}"
            errors.append(f"unexpected {', '.join(files.key_of(name, which) for which in pair)}: {found} there")
    errors += missing(modules, config, factors)
    if errors or not factors:
        return errors or ["it has no factors"]
    report, _ = find_linears(model, Selection(exactly(factors)))
    return [f"{name} cannot be replaced: {report.skipped[name]}" for name in factors if name not in report.replaced]


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


def _replace(model: nn.Module, config: LoRAConfig, factors: dict[str, dict[str, Tensor]]) -> ReplaceReport:
    """LoRALinear in the place of the linears that the file has factors for."""
    config = dataclasses.replace(
        config, target_modules=exactly(factors), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        rank_pattern=of_any(factors, config.rank_pattern), alpha_pattern=of_any(factors, config.alpha_pattern),
    )  # fmt: skip
    dtypes = {tensor.dtype for pair in factors.values() for tensor in pair.values()}
    dtypes |= {size_and_dtype(model.get_submodule(name))[1] for name in factors}
    return convert(model, config, lora_dtype=reduce(torch.promote_types, dtypes), freeze=True)


@torch.no_grad()
def _copy(layers: dict[str, LoRALinear], factors: dict[str, dict[str, Tensor]], biases: dict[Tensor, Tensor]) -> None:
    for name, layer in layers.items():
        for which, tensor in factors[name].items():
            getattr(layer, which).copy_(tensor)
    for parameter, tensor in biases.items():
        parameter.copy_(tensor)
