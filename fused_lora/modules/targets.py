"""find_linears: which nn.Linear modules of a model can be replaced, and why the others cannot."""

import re
from collections.abc import Iterable

from torch import nn

from .. import checks
from .lora_mlp import has_hooks
from .report import ReplaceReport


def find_linears(
    model: nn.Module, target_modules: str | Iterable[str] | None, exclude_modules: str | Iterable[str] | None
) -> tuple[ReplaceReport, list[nn.Linear]]:
    """What replace_linear would replace, by name and the modules themselves; ValueError if that is nothing."""
    target_modules, exclude_modules = listed(target_modules), listed(exclude_modules)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    report, targets = ReplaceReport(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = _skip_reason(names[id(module)], module, target_modules, exclude_modules, owners)
            if reason is None:
                report.replaced.append(name)
                targets.append(module)
            else:
                report.skipped[name] = reason
    if not targets:
        raise ValueError(f"target_modules matches no nn.Linear that can be replaced: {report}")
    return report, targets


def listed(modules: str | Iterable[str] | None) -> str | list[str] | None:
    """An iterator would be used up by the first layer."""
    return modules if modules is None or isinstance(modules, str) else list(modules)


def _matches(name: str, modules: str | Iterable[str]) -> bool:
    """A string is a regular expression for the whole name; otherwise each entry is a name or its last parts."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in modules)


def _matches_any(names: list[str], modules: str | Iterable[str]) -> bool:
    return any(_matches(name, modules) for name in names)


def _skip_reason(names: list[str], linear: nn.Linear, target_modules, exclude_modules, owners) -> str | None:
    if target_modules is not None and not _matches_any(names, target_modules):
        return "not in target_modules"
    if exclude_modules is not None and _matches_any(names, exclude_modules):
        return "in exclude_modules"
    if names == [""]:
        return "it is the model itself; use LoRALinear.from_linear"
    if type(linear) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(linear).__name__})"
    if has_hooks(linear):
        return "it has hooks, which a replacement would lose"
    if "forward" in vars(linear):
        return "its forward was replaced, which a replacement would lose"
    if not checks.computes_in(linear.weight.dtype):
        return f"its weight is {linear.weight.dtype}"
    for parameter_name, parameter in linear.named_parameters(recurse=False):
        sharers = owners[id(parameter)] - {names[0]}
        if sharers:
            return f"its {parameter_name} is shared with {', '.join(sorted(sharers))}"
    return None
