"""Adapters of LoRABank layers as files: one adapter a folder, as PEFT has them."""

import dataclasses
from functools import reduce
from types import SimpleNamespace

import torch
from torch import nn

from ..modules import LoRABank, ReplaceReport, add_adapter
from ..modules.banks import banks_with
from ..modules.config import LoRAConfig
from ..modules.protocol import is_bank
from ..modules.quantised import size_and_dtype
from . import files
from .layers import bare_name, modules_of
from .reading import exactly, missing, of_any, shape_errors


def has_banks(model: nn.Module) -> bool:
    return any(map(is_bank, model.modules()))


def layers_of_adapter(model: nn.Module, name: str | None) -> dict[str, SimpleNamespace]:
    """An adapter's layers by name, each with what a LoRALinear has."""
    if name is None:
        raise ValueError("name must be given of a model with LoRABank layers: which of their adapters is meant")
    found = {}
    for layer, bank in banks_with(model, name).items():
        adapter, (A, B) = bank.adapters[name], bank.factors(name)
        found[bare_name(layer)] = SimpleNamespace(
            r=adapter.r, lora_alpha=adapter.lora_alpha, use_rslora=adapter.use_rslora, lora_A=A, lora_B=B,
            use_dora=False, lora_dropout=adapter.lora_dropout, bias=None,
        )  # fmt: skip
    return found


def factors_of_all(model: nn.Module) -> list[nn.Parameter]:
    """Of every adapter of every bank."""
    banks = filter(is_bank, model.modules())
    return [factor for bank in banks for name in bank.adapters for factor in bank.factors(name)]


def errors_of(
    model: nn.Module, name: str, config: LoRAConfig, factors: dict, biases: dict, lora_dtype: torch.dtype | None
) -> list[str]:
    """What of a file does not fit as the adapter of a name, new or one that the model has."""
    errors = ["use_dora=True: banks have no magnitudes"] if config.use_dora else []
    errors += [f"unexpected bias of {layer}: those of banks are the base's" for layer in biases]
    errors += [] if factors else ["it has no factors"]
    modules, known = modules_of(model), _banks_of(model, name)
    for layer in known.keys() - factors.keys():
        errors += [f"missing {files.key_of(layer, which)}" for which in files.FACTORS]
    for layer, pair in factors.items():
        errors += _layer_errors(layer, pair, modules.get(layer), known, config, name)
        errors += _infinite(layer, pair, modules.get(layer), lora_dtype)
    return errors if known else errors + missing(modules, config, factors)


def _infinite(layer: str, pair: dict, module, lora_dtype: torch.dtype | None) -> list[str]:
    """What is no number where it will be held: it would spoil the results of other adapters."""
    dtype = module.lora_dtype if is_bank(module) else lora_dtype
    held = {which: each if dtype is None else each.to(dtype) for which, each in pair.items()}
    words = "" if dtype is None else f" in {dtype}"
    return [f"{files.key_of(layer, w)} is not finite{words}" for w, each in held.items() if not each.isfinite().all()]


def _layer_errors(layer: str, pair: dict, module, known: dict, config: LoRAConfig, name: str) -> list[str]:
    r = config.of(layer)[0]
    if known and layer not in known:
        return [f"unexpected {files.key_of(layer, which)}: {name} is not there" for which in pair]
    if known and known[layer].adapters[name].r != r:
        return [f"{layer} has r={known[layer].adapters[name].r}, the config says r={r}"]
    if isinstance(module, nn.Linear) or is_bank(module):
        return shape_errors(layer, pair, r, size_and_dtype(module)[0])
    found = "no such module" if module is None else f"a {type(module).__name__}"
    return [f"unexpected {', '.join(files.key_of(layer, which) for which in pair)}: {found} there"]


def load(
    model: nn.Module, name: str, config: LoRAConfig, factors: dict, lora_dtype: torch.dtype | None
) -> ReplaceReport | None:
    """What errors_of has nothing against. The report of linears that became banks, if the adapter is new."""
    report = None
    if not _banks_of(model, name):
        modules = modules_of(model)
        dtypes = {tensor.dtype for pair in factors.values() for tensor in pair.values()}
        dtypes |= {size_and_dtype(modules[layer])[1] for layer in factors}
        asked = dataclasses.asdict(_exact(config, factors))
        dtype = lora_dtype or reduce(torch.promote_types, dtypes)
        # What trains beside adapters that are there already is somebody's wish.
        report = add_adapter(model, name, config=asked, lora_dtype=dtype, freeze=not has_banks(model))
    for layer, bank in _banks_of(model, name).items():
        with torch.no_grad():
            for factor, which in zip(bank.factors(name), files.FACTORS, strict=True):
                factor.copy_(factors[layer][which])
        bank.set_lora_alpha(name, config.of(layer)[1], config.use_rslora)
        bank.set_lora_dropout(name, config.lora_dropout)
    return report


def _banks_of(model: nn.Module, name: str) -> dict[str, LoRABank]:
    modules = modules_of(model)
    return {layer: bank for layer, bank in modules.items() if is_bank(bank) and name in bank.adapters}


def _exact(config: LoRAConfig, factors: dict) -> LoRAConfig:
    """For the layers of a file alone."""
    return dataclasses.replace(
        config, target_modules=exactly(factors), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        rank_pattern=of_any(factors, config.rank_pattern), alpha_pattern=of_any(factors, config.alpha_pattern),
        bias="none", task_type=None,
    )  # fmt: skip
