"""find_linears: which nn.Linear modules of a model can be replaced, and why the others cannot."""

import re
import warnings
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from .heads import head_modules
from .lora_linear import LoRALinear
from .obstacles import Sharing, obstacle
from .report import ReplaceReport
from .weight_readers import weight_readers

# Modules that are known to hold matrices which no LoRA of a linear is about.
NO_LINEARS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd)
NOT_TARGETED = "not in target_modules"
Modules = str | Iterable[str] | None  # a regular expression, names, or no choice


def find_linears(
    model: nn.Module, target_modules: Modules, exclude_modules: Modules
) -> tuple[ReplaceReport, list[nn.Linear]]:
    """What replace_linear would replace, by name and the modules themselves; ValueError if that is nothing."""
    _refuse_peft(model)
    targets, excluded = listed(target_modules), listed(exclude_modules)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    reasons = _Reasons(model, by_default=targets is None)
    report, linears, candidates = ReplaceReport(), [], []
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _unlike(module)):
            continue
        candidates += names[id(module)]
        reason = _choice(names[id(module)], targets, excluded) or reasons.of(module)
        if reason is None:
            report.replaced.append(name)
            linears.append(module)
        elif isinstance(module, nn.Linear) or reason != NOT_TARGETED:
            report.skipped[name] = reason
    for argument, modules in (("target_modules", targets), ("exclude_modules", excluded)):
        report.unmatched += _unmatched(argument, modules, candidates)
    if not linears:
        what = "model has" if targets is None else "target_modules matches"
        how = " (a string is a regular expression for the whole name)" if isinstance(targets, str) else ""
        raise ValueError(f"{what} no nn.Linear that can be replaced{how}: {report}")
    for entry in report.unmatched:
        warnings.warn(f"{entry} matches no linear layer", stacklevel=3)
    return report, linears


def listed(modules: Modules) -> str | list[str] | None:
    """An iterator would be used up by the first layer."""
    return modules if modules is None or isinstance(modules, str) else list(modules)


def _matches(name: str, modules: str | Iterable[str]) -> bool:
    """A string is a regular expression for the whole name; otherwise each entry is a name or its last parts."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in modules)


def _matches_any(names: list[str], modules: str | Iterable[str]) -> bool:
    return any(_matches(name, modules) for name in names)


def _unmatched(argument: str, modules: str | list[str] | None, names: list[str]) -> list[str]:
    """The entries that name none of the layers."""
    patterns = {modules: modules} if isinstance(modules, str) else {entry: [entry] for entry in modules or ()}
    return [f"{argument} entry {entry!r}" for entry, each in patterns.items() if not _matches_any(names, each)]


def _choice(names: list[str], targets: str | list[str] | None, excluded: str | list[str] | None) -> str | None:
    """Why the arguments leave a layer out, or None."""
    if targets is not None and not _matches_any(names, targets):
        return NOT_TARGETED
    if excluded is not None and _matches_any(names, excluded):
        return "in exclude_modules"
    return None


class _Reasons:
    """Why modules of a model cannot be replaced."""

    def __init__(self, model: nn.Module, by_default: bool):
        self.model = model
        self.sharing = Sharing(model)
        self.readers = weight_readers(model)
        self.heads = head_modules(model) if by_default else set()

    def of(self, module: nn.Module) -> str | None:
        if module is self.model and isinstance(module, nn.Linear):
            return "it is the model itself; use LoRALinear.from_linear"
        reason = _unlike(module) or obstacle(module) or self.sharing.obstacle(module)
        if reason is None and id(module) in self.readers:
            reason = f"{self.readers[id(module)]} reads its weight, which would leave the update out"
        if reason is None and module in self.heads:
            reason = "a head, which is adapted where target_modules names it"
        return reason


def _unlike(module: nn.Module) -> str | None:
    """What a module is that holds weights like a linear's, or several, and is no nn.Linear; None for others."""
    if isinstance(module, LoRALinear):
        return "a LoRALinear already"
    if isinstance(module, (nn.Linear, *NO_LINEARS)):
        return None
    weights = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in module.named_parameters(recurse=False)
        if not is_lazy(parameter) and _like_a_linears(name, parameter)
    ]
    return f"no nn.Linear but {type(module).__name__} with {', '.join(weights)}" if weights else None


def _like_a_linears(name: str, parameter: nn.Parameter) -> bool:
    """A matrix, or one for each of several experts; tables of positions and the like have other names or sides of 1."""
    sides = parameter.dim()
    return min(parameter.shape, default=1) > 1 and (sides == 3 or (sides == 2 and "weight" in name))


def _refuse_peft(model: nn.Module) -> None:
    """Its layers hold linears of their own, as bases and as factors."""
    for name, module in model.named_modules():
        if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
            raise ValueError(f"model has adapters of PEFT already ({name}): merge_and_unload() or unload() them first")
