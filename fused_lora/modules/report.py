"""ReplaceReport: what replace_linear did, by the names of the layers."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from .frozen import Frozen
from .lora_linear import LoRALinear
from .protocol import is_bank


@dataclass
class ReplaceReport:
    """Names of the layers replaced, of the linears left alone with the reason, and of what is computed together: groups
    of layers that read one x, and gated MLPs. Modules that are no linears and hold such weights (experts, Conv1D) are
    among those left alone; unmatched are the entries of target_modules and exclude_modules that name no layer; adapted,
    of add_adapter, are those that got the adapter, new ones and others.

    trainable, parameters and updates count elements as replace_linear left the model: those that require gradients,
    all, and those of the factors and trained biases of LoRALinear layers. base is the format that frozen weights are in
    now, or None."""

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    base: str | None = None
    trainable: int = 0
    parameters: int = 0
    updates: int = 0

    def count(self, model: nn.Module) -> None:
        """Counts the parameters of `model` as they are now."""
        layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
        layers += [factors for bank in model.modules() if is_bank(bank) for factors in (bank.lora_A, bank.lora_B)]
        self.parameters = _all_elements(model)
        self.trainable = _elements(filter(_trains, model.parameters()))
        self.updates = _elements(filter(_trains, (p for layer in layers for p in layer.parameters(recurse=False))))

    def layers(self, model: nn.Module) -> list[LoRALinear]:
        """The replacements, in `model`."""
        return [model.get_submodule(name) for name in self.replaced]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} linear layers, left {len(self.skipped)}"]
        if self.adapted:
            lines[0] = f"an adapter more in {len(self.adapted)} linear layers, left {len(self.skipped)}"
        lines += [f"frozen weights are in {self.base}"] if self.base else []
        lines += [self._counts()] if self.parameters else []
        lines += [f"  + {name}" for name in self.adapted or self.replaced]
        lines += [f"  - {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  ? {entry} matches no linear layer" for entry in self.unmatched]
        lines += [f"  = {', '.join(names)}: together where they get one x" for names in self.groups]
        lines += [f"  = {name}: as one" for name in self.mlps]
        return "\n".join(lines)

    def _counts(self) -> str:
        share = f"{self.trainable / self.parameters:.4%}"
        line = f"trains {self.trainable:,} of {self.parameters:,} parameters ({share})"
        others = self.trainable - self.updates
        return f"{line}, {others:,} of them outside the updates: freeze=True leaves those out" if others else line


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many of a model's parameters train, in PEFT's words:

    trainable params: 1,024 || all params: 9,216 || trainable%: 11.1111
    """
    trainable, everything = _elements(filter(_trains, model.parameters())), _all_elements(model)
    share = 100 * trainable / max(everything, 1)
    print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def _all_elements(model: nn.Module) -> int:
    """A weight in a format counts as the matrix that it stands for."""
    total = _elements(model.parameters())
    for layer in model.modules():
        if isinstance(layer, Frozen) and layer.base is not None:
            held = (tensor for tensor in layer.frozen_tensors() if tensor is not None)
            total += layer.out_features * layer.in_features - _elements(held)
    return total


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    """A lazy module's have no size yet."""
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad
