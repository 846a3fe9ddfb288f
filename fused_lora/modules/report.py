"""ReplaceReport: what replace_linear did, by the names of the layers."""

from dataclasses import dataclass, field

from torch import nn

from .lora_linear import LoRALinear


@dataclass
class ReplaceReport:
    """Names of the layers replaced, of the linears left alone with the reason, and of what is computed together: groups
    of layers that read one x, and gated MLPs."""

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)

    def layers(self, model: nn.Module) -> list[LoRALinear]:
        """The replacements, in `model`."""
        return [model.get_submodule(name) for name in self.replaced]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} linear layers, left {len(self.skipped)}"]
        lines += [f"  + {name}" for name in self.replaced]
        lines += [f"  - {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  = {', '.join(names)}: together" for names in self.groups]
        lines += [f"  = {name}: as one" for name in self.mlps]
        return "\n".join(lines)
