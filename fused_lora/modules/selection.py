"""Selection: which linears are asked for, by name, as PEFT's LoraConfig asks."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .heads import head_modules, output_heads

ALL_LINEAR = "all-linear"
NOT_TARGETED = "not in target_modules"
Modules = str | Iterable[str] | None  # a regular expression or "all-linear", names, or no choice


@dataclass
class Selection:
    """The fields of PEFT's LoraConfig that choose layers, under its names and with its meaning.

    Without target_modules every linear is chosen but heads (heads.py), by "all-linear" all but PEFT's idea of them.
    layers_to_transform keeps those of a list of target_modules whose name has one of the numbers after a part that
    layers_pattern names, by default after any part but the first; what target_modules names in full is kept anyway.
    """

    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    task_type: str | None = None

    def __post_init__(self):
        self.target_modules, self.exclude_modules = listed(self.target_modules), listed(self.exclude_modules)
        for name in ("target_modules", "exclude_modules"):
            _check_expression(name, getattr(self, name))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR

    @property
    def by_name(self) -> bool:
        """Whether target_modules names layers."""
        return self.target_modules not in (None, ALL_LINEAR)

    def reason(self, names: list[str]) -> str | None:
        """Why a layer with these names is left out, or None."""
        if self.by_name and not _matches_any(names, self.target_modules):
            return NOT_TARGETED
        if self.exclude_modules and _matches_any(names, self.exclude_modules):
            return "in exclude_modules"
        return None if any(map(self._in_layers, names)) else "not in layers_to_transform"

    def heads(self, model: nn.Module) -> set[nn.Module]:
        """What is left out because nothing names it."""
        if self.target_modules is None:
            return head_modules(model)
        return output_heads(model, self.task_type) if self.target_modules == ALL_LINEAR else set()

    def unmatched(self, names: list[str]) -> list[str]:
        """The entries that name none of the layers."""
        found = _unmatched("target_modules", self.target_modules if self.by_name else None, names)
        return found + _unmatched("exclude_modules", self.exclude_modules, names)

    def _in_layers(self, name: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == [] or name in self.target_modules:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns or ()] or [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", name) for start in starts)), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def _check_expression(name: str, modules: Modules) -> None:
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error as error:
        raise ValueError(
            f"{name} must be a regular expression where it is a string, got {modules!r}: {error}"
        ) from None


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
    patterns = {modules: modules} if isinstance(modules, str) else {entry: [entry] for entry in modules or ()}
    return [f"{argument} entry {entry!r}" for entry, each in patterns.items() if not _matches_any(names, each)]
