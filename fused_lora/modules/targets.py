"""find_linears: which nn.Linear modules of a model can be replaced, and why the others cannot."""

import warnings
from typing import NoReturn

from torch import nn
from torch.nn.parameter import is_lazy

from .lora_linear import LoRALinear
from .obstacles import Sharing, obstacle
from .protocol import is_bank
from .report import ReplaceReport
from .selection import NOT_TARGETED, Selection
from .weight_readers import weight_readers

# Modules that are known to hold matrices which no LoRA of a linear is about.
NO_LINEARS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.modules.conv._ConvNd)


def find_linears(model: nn.Module, selection: Selection) -> tuple[ReplaceReport, list[nn.Linear]]:
    """What replace_linear would replace, by name and the modules themselves; ValueError if that is nothing."""
    report, linears, _ = find_targets(model, selection)
    if not linears:
        raise_none(report, selection)
    return report, linears


def find_targets(model: nn.Module, selection: Selection) -> tuple[ReplaceReport, list[nn.Linear], dict[str, nn.Module]]:
    """The same, where it may be nothing; and the banks that are chosen, by name."""
    _refuse_peft(model)
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    reasons = _Reasons(model, selection.heads(model))
    report, linears, banks, candidates = ReplaceReport(), [], {}, []
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _unlike(module)):
            continue
        candidates += names[id(module)]
        chosen = selection.reason(names[id(module)])
        if chosen is None and is_bank(module) and module not in reasons.heads:
            banks[name] = module
        reason = chosen or reasons.of(module)
        if reason is None:
            report.replaced.append(name)
            linears.append(module)
        elif isinstance(module, nn.Linear) or reason != NOT_TARGETED:
            report.skipped[name] = reason
    report.unmatched += selection.unmatched(candidates)
    for entry in report.unmatched if linears or banks else ():
        warnings.warn(f"{entry} matches no linear layer", stacklevel=5)
    return report, linears, banks


def raise_none(report: ReplaceReport, selection: Selection) -> NoReturn:
    """ValueError: nothing can be replaced."""
    what = "target_modules matches" if selection.by_name else "model has"
    is_one = selection.by_name and isinstance(selection.target_modules, str)
    how = " (a string is a regular expression for the whole name)" if is_one else ""
    raise ValueError(f"{what} no nn.Linear that can be replaced{how}: {_why_none(report)}")


def _why_none(report: ReplaceReport) -> str:
    """One line where there is one reason."""
    if len(set(report.skipped.values())) != 1:
        return str(report)
    first, *others = report.skipped
    return f"{first}{f' and {len(others)} others' if others else ''}: {report.skipped[first]}"


class _Reasons:
    """Why modules of a model cannot be replaced."""

    def __init__(self, model: nn.Module, heads: set[nn.Module]):
        self.model = model
        self.sharing = Sharing(model)
        self.readers = weight_readers(model)
        self.heads = heads

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
    if is_bank(module):
        return "a LoRABank already"
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
            raise ValueError(
                f"model has adapters of PEFT already ({name}): fused_lora.integrations.peft.accelerate "
                "computes them, or merge_and_unload() or unload() them first"
            )
