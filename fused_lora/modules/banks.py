"""Adapters of a whole model: added, deleted and renamed in all banks that have them."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from .. import checks
from ..formats import Format
from .config import LoRAConfig, asked_for, fields_of, forget, remember, remembered
from .exchanging import exchange
from .freezing import freeze_all_but_updates
from .frozen import asked_base, names_of_bases, naming
from .fusing import fuse as fuse_layers
from .lora_bank import LoRABank
from .protocol import is_bank
from .report import ReplaceReport
from .selection import Selection
from .targets import find_targets, raise_none


def add_adapter(
    model: nn.Module,
    name: str,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    config=None,
    lora_dtype: torch.dtype | None = None,
    capacity: int = 0,
    fuse: str = "auto",
    freeze: bool = False,
    base: str | Format | None = None,
) -> ReplaceReport:
    """One adapter more for linears of a model, under a name by which route() gives it rows: nn.Linear modules become
    LoRABank layers, in place, and those that are some get it beside the ones that they have.

    target_modules, exclude_modules, rank_pattern, alpha_pattern and config choose the layers and their r and lora_alpha
    as in replace_linear, each time anew: adapters may differ in all of it, and in lora_dropout. lora_dtype, capacity
    (ranks) and base are those of new banks; fuse and base are replace_linear's. The bases stop requiring gradients;
    everything else is left as it was, but with freeze=True all but adapters stops too.

    Raises ValueError naming the argument, RuntimeError where a captured CUDA graph leaves no room; nothing has changed
    then. LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    asked = _config(config, r=r, lora_alpha=lora_alpha, target_modules=target_modules, exclude_modules=exclude_modules,
                    use_rslora=use_rslora, lora_dropout=lora_dropout, rank_pattern=rank_pattern,
                    alpha_pattern=alpha_pattern)  # fmt: skip
    base = asked_base(base)
    report, linears, banks = find_targets(model, asked.selection)
    if not linears and not banks:
        raise_none(report, asked.selection)
    named = zip(report.replaced, linears, strict=True)
    made = {layer: naming(layer, LoRABank.beside, linear, lora_dtype, capacity, base) for layer, linear in named}
    found = banks | made
    every = {layer: found[layer] for layer, _ in model.named_modules() if layer in found}
    for layer, bank in every.items():
        bank.check_new(name, *asked.of(layer), asked.lora_dropout)
    for entry in asked.unmatched(list(every)):
        warnings.warn(f"{entry} matches no layer that gets the adapter", stacklevel=2)
        report.unmatched.append(entry)
    _add_to_all(every, name, asked)
    _install(model, linears, list(made.values()), base)
    for layer in banks:
        del report.skipped[layer]
    report.adapted, report.base = list(every), names_of_bases(made.values())
    if config is not None:
        remember(model, fields_of(config), name)
    if freeze:
        freeze_all_but_updates(model)
    report.count(model)
    if fuse == "auto" and made:
        report.groups, report.mlps = fuse_layers(model, list(made.values()))
    return report


def banks_for(
    model: nn.Module,
    selection: Selection,
    lora_dtype: torch.dtype | None,
    capacity: int,
    fuse: str = "auto",
    base: str | Format | None = None,
) -> dict[str, LoRABank]:
    """The linears that are selected as banks, in the model's order: those that are some already, and new ones."""
    base = asked_base(base)
    report, linears, banks = find_targets(model, selection)
    if not linears and not banks:
        raise_none(report, selection)
    named = zip(report.replaced, linears, strict=True)
    made = [naming(layer, LoRABank.beside, linear, lora_dtype, capacity, base) for layer, linear in named]
    _install(model, linears, made, base)
    if fuse == "auto" and made:
        fuse_layers(model, made)
    wanted = {*map(id, banks.values()), *map(id, made)}
    return {layer: module for layer, module in model.named_modules() if id(module) in wanted}


def _install(model: nn.Module, linears: list[nn.Linear], banks: list[LoRABank], base: Format | None = None) -> None:
    exchange(model, {id(linear): bank for linear, bank in zip(linears, banks, strict=True)})
    for linear, bank in zip(linears, banks, strict=True):
        bank.quantise(linear, base)
        bank.take_base()


def _config(config, **given) -> LoRAConfig:
    if config is None:
        checks.check_rank(given["r"])
        if given["lora_alpha"] is None:
            given["lora_alpha"] = 1.0
            warnings.warn("lora_alpha was left out, and is 1.0: scale is 1 / r (PEFT's default is 8)", stacklevel=3)
        return LoRAConfig(**given)
    beside = [name for name, value in given.items() if value not in (None, False, 0.0)]
    if beside:
        raise ValueError(f"give config or {', '.join(beside)}, not both")
    asked = asked_for(fields_of(config))
    unserved = [f"use_dora={asked.use_dora!r}"] if asked.use_dora else []
    if asked.bias != "none":
        unserved.append(f"bias={asked.bias!r}")
    if unserved:
        raise ValueError(f"config asks for what banks do not serve: {', '.join(unserved)}")
    return asked


def _add_to_all(banks: dict[str, LoRABank], name: str, asked: LoRAConfig) -> None:
    """Or to none of them."""
    done = []
    try:
        for layer, bank in banks.items():
            bank.add_adapter(name, *asked.of(layer), asked.use_rslora, asked.lora_dropout)
            done.append(bank)
    except BaseException:
        for bank in done:
            bank.delete_adapter(name)
        raise


def banks_with(model: nn.Module, name: str) -> dict[str, LoRABank]:
    """The banks of a model that have an adapter, by name; ValueError for none."""
    banks = {layer: module for layer, module in model.named_modules() if is_bank(module)}
    found = {layer: bank for layer, bank in banks.items() if name in bank.adapters}
    if not found:
        known = sorted({each for bank in banks.values() for each in bank.adapters})
        raise ValueError(f"name must be an adapter of the model ({', '.join(known) or 'it has none'}), got {name!r}")
    return found


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter out of all banks, whose memory the next one gets. Routes made before raise RuntimeError."""
    for bank in banks_with(model, name).values():
        bank.delete_adapter(name)
    forget(model, name)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """The same parameters under another name. Routes made before raise RuntimeError."""
    banks = banks_with(model, old)
    for bank in model.modules():
        if is_bank(bank):
            bank.check_name(new)
    for bank in banks.values():
        bank.rename_adapter(old, new)
    remember(model, remembered(model, old), new)
    forget(model, old)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """An adapter's factors in all banks, for an optimizer or a parameter group of its own."""
    return [factor for bank in banks_with(model, name).values() for factor in bank.factors(name)]
