"""accelerate and restore: the LoRA linears of a PEFT model by this package's kernels, in place, and back."""

from dataclasses import dataclass, field

from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...modules.fusing import fuse as fuse_layers
from ...modules.lora_linear import LoRALinear
from ...modules.mixins import Mixin, mix, unmix
from ...modules.replace import FUSE
from ...modules.unload import Model
from .by_name import Copies
from .linear import BASES, AcceleratedLinear, is_linear


@dataclass
class AccelerateReport:
    """Names of PEFT's LoRA linears that the kernels compute as the model is now, of those that keep PEFT's forward with
    the reason (for as long as it holds; other layers of PEFT for good), of those served ones that keep it for batches
    whose samples name their adapters (adapter_names), and of what is computed together: groups of layers that read one
    x, and gated MLPs."""

    served: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    kept_by_name: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.served)} LoRA linears by the kernels, {len(self.kept)} by PEFT's own forward"]
        lines += [f"  + {name}" for name in self.served]
        lines += [f"  - {name}: {reason}" for name, reason in self.kept.items()]
        for reason in dict.fromkeys(self.kept_by_name.values()):
            names = [name for name, found in self.kept_by_name.items() if found == reason]
            which = "all of them" if len(names) == len(self.served) else ", ".join(names)
            lines.append(f"  - {which}, where samples name their adapters: {reason}")
        lines += [f"  = {', '.join(names)}: together where they get one x" for names in self.groups]
        lines += [f"  = {name}: as one" for name in self.mlps]
        return "\n".join(lines)


def accelerate(model: nn.Module, fuse: str = "auto") -> AccelerateReport:
    """Lets this package's kernels compute the LoRA linears of a PeftModel, or of any model with layers of PEFT in it,
    in place, and returns what they do and what they leave to PEFT and why.

    Nothing else changes: names, parameters, state dicts and files, adapters that are added, chosen, merged or deleted,
    and what is an instance of what. Each call of a layer is computed by the kernels where they give the same, up to
    rounding and to which entries dropout picks; else by PEFT's own forward (explain(model) says which, and why).

    With fuse="auto", layers that a module calls with one x, as its source says, are computed together, and gated MLPs
    as one; with "off" each layer stays alone. Layers that a later add_adapter wraps are PEFT's until the next call.

    Raises ValueError for a model without a LoRA linear that could be computed so.
    """
    if fuse not in FUSE:
        raise ValueError(f"fuse must be one of {', '.join(FUSE)}, got {fuse!r}")
    restore(model)
    report, layers = AccelerateReport(), []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        reason = _obstacle(module)
        if reason is None:
            layers.append(module)
            if not isinstance(module, AcceleratedLinear):  # as one that was sharded since is
                module._scales, module._copies = {}, Copies()
                mix(module, AcceleratedLinear)
            reason = module.why_not()
        if reason is None:
            module.ready()
            report.served.append(name)
            by_name = module.why_not_by_name()
            report.kept_by_name |= {name: by_name} if by_name else {}
        else:
            report.kept[name] = reason
    if not layers:
        hint = f": {report}" if report.kept else ", which get_peft_model gives it"
        raise ValueError(f"model has no LoRA linear of PEFT that the kernels could compute{hint}")
    if fuse == "auto":
        groups, mlps = fuse_layers(model, layers)
        report.groups = [names for names in groups if not report.kept.keys() & set(names)]
        report.mlps = [name for name in mlps if not any(kept.startswith(f"{name}.") for kept in report.kept)]
    return report


def restore(model: Model) -> Model:
    """Undoes accelerate, in place: every layer is computed by PEFT again. Returns the model.

    Also of a model that PEFT has unloaded, whose layers are gone and the modules around them are not. What got a
    subclass of its class since, as FSDP's fully_shard gives, stays as it is.
    """
    for module in model.modules():
        # PEFT's DoraCaching: it forgets at calls outside of it, which accelerated layers do not show it.
        forget = getattr(module, "_cache_clear", None)
        if forget is not None:
            forget()
        # What replace_linear made of a module stays.
        if isinstance(module, Mixin) and not any(isinstance(child, LoRALinear) for child in module.children()):
            unmix(module)
    return model


def _obstacle(layer: nn.Module) -> str | None:
    """Why a layer of PEFT is never computed by the kernels, or None."""
    if not is_linear(layer):
        return f"it is a {_class_of(layer)}"
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if Linear.forward.__module__ != Linear.__module__:
        return f"PEFT's own forward was replaced by one of {Linear.forward.__module__}"
    return None if type(layer.base_layer) in BASES else f"its base is a {_class_of(layer.base_layer)}"


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
