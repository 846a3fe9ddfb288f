"""AcceleratedLinear: what a LoRA linear of PEFT becomes, and the rule by which each of its calls is computed."""

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ... import checks, ops
from ...modules import hooks, siblings
from ...modules.mixins import Mixin
from ...modules.scaled import scale_beside

# Modules that a layer holds and a kernel computes for, by the forwards that they are known for.
BASES = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}
FACTORS = {nn.Linear: nn.Linear.forward}
DROPOUTS = {nn.Identity: nn.Identity.forward, nn.Dropout: nn.Dropout.forward}


class AcceleratedLinear(Mixin):
    """A peft.tuners.lora.Linear whose forward is ops.lora_linear wherever that gives the same:

        y = x W^T + sum over active adapters of scaling dropout(x) A^T B^T + bias

    Its children, parameters and attributes are PEFT's, and so are its other methods. In every call why_not decides:
    what it has a word for is computed by the forward that PEFT gave the class. Where several adapters are active,
    their factors are computed as one pair of the sum of their ranks.
    """

    _adds = ("_scales",)
    _scales: dict[str, tuple[float, Tensor]]  # by adapter: the number that PEFT has, and the tensor that kernels read

    def forward(self, x: Tensor, *args, **kwargs):
        if args or kwargs or not isinstance(x, Tensor) or self.why_not() is not None:
            return super().forward(x, *args, **kwargs)
        if siblings.thread.call is not None:
            y = siblings.output(self, x)
            if y is not None:
                return y
        weight, A, B, bias, scale, _ = self.lora_part()
        return ops.lora_linear(x, weight, A, B, bias, scale, self.dropping)

    # What modules/protocol.py asks of any layer. `merged` is PEFT's.

    @property
    def frozen_weight(self) -> Tensor:
        """The base's as nn.Linear has it: Conv1D's is its transpose."""
        base = self._modules["base_layer"]
        return base.weight.t() if type(base) is Conv1D else base.weight

    @property
    def dropping(self) -> float:
        """The probability by which it drops now."""
        names = self._names()
        return self._dropping(names[0]) if names else 0.0  # where they differ, why_not has a word for it

    def lora_part(self) -> ops.Part:
        """Of one adapter its own tensors. Several are one of as many ranks, with their scales in B."""
        names, weight, bias = self._names(), self.frozen_weight, self._modules["base_layer"].bias
        As, Bs = self._factors("lora_A", names), self._factors("lora_B", names)
        scales = [self._scale(name, weight) for name in names]
        for B, scale in zip(Bs, scales, strict=True):
            if B.bias is not None:
                own = B.bias * scale
                bias = own if bias is None else bias + own
        if len(names) == 1:
            return ops.Part(weight, As[0].weight, Bs[0].weight, bias, scales[0])
        A = torch.cat([each.weight for each in As])
        B = torch.cat([each.weight * scale for each, scale in zip(Bs, scales, strict=True)], 1)
        return ops.Part(weight, A, B, bias, self._known_scale("", 1.0, weight))

    def lora_sources(self) -> tuple:
        """The parameters and the scales."""
        names, base = self._names(), self._modules["base_layer"]
        factors = (*self._factors("lora_A", names), *self._factors("lora_B", names))
        tensors = [tensor for each in (base, *factors) for tensor in (each.weight, each.bias)]
        return *tensors, *(self.scaling[name] for name in names)

    def why_not(self) -> str | None:
        """Why PEFT's own forward computes it now, or None."""
        if not self.is_as_known():
            return "its class has another forward now"
        if self._disable_adapters:
            return "its adapters are disabled"
        if self.merged_adapters:
            return f"merged: {', '.join(self.merged_adapters)}"
        names = self._names()
        if not names:
            return "none of its adapters is active"
        return self._adapter_obstacle(names) or self._base_obstacle() or self._factor_obstacle(names)

    def why_alone(self) -> str | None:
        """Why nobody may compute it but by calling it, or None."""
        return self.why_not() or hooks.why_alone(self, type(self).forward)

    def _names(self) -> list[str]:
        """The active adapters that it has."""
        active, own = self._active_adapter, self._modules["lora_A"]._modules
        return [name for name in ([active] if isinstance(active, str) else active) if name in own]

    def _factors(self, which: str, names: list[str]) -> list[nn.Module]:
        own = self._modules[which]._modules
        return [own[name] for name in names]

    def _dropping(self, name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _scale(self, name: str, weight: Tensor) -> Tensor:
        """What PEFT has as a number, or as a tensor where adapters are to be exchanged in compiled code."""
        scaling = self.scaling[name]
        if not isinstance(scaling, Tensor):
            return self._known_scale(name, scaling, weight)
        return scaling.to(weight.device, checks.scale_dtype(weight))

    def _known_scale(self, name: str, scaling: float, weight: Tensor) -> Tensor:
        """The same tensor as long as the number is the same and the weight stays where it is."""
        known, scale = self._scales.get(name, (None, None))
        if known != scaling or scale.device != weight.device or scale.dtype != checks.scale_dtype(weight):
            scale = scale_beside(scaling, weight)
            self._scales[name] = scaling, scale
        return scale

    def _adapter_obstacle(self, names: list[str]) -> str | None:
        variants = getattr(self, "lora_variant", {})  # PEFT before 0.16 has use_dora alone
        for name in names:
            if name in variants or self.use_dora.get(name):
                kind = "DoRA" if self.use_dora.get(name) else type(variants[name]).__name__
                return f"adapter {name} is no plain LoRA but {kind}"
        if len(names) > 1 and any(self._dropping(name) for name in names):
            return "several adapters are active, and each drops by a mask of its own"
        return None

    def _base_obstacle(self) -> str | None:
        base = self._modules["base_layer"]
        reason = hooks.why_not_known(base, BASES)
        if reason is not None:
            return f"its base cannot be passed over: {reason}"
        reason = _weight_obstacle(base.weight)
        if reason is None and base.weight.requires_grad and torch.is_grad_enabled():
            reason = "requires gradients"
        return reason and f"its base's weight {reason}"

    def _factor_obstacle(self, names: list[str]) -> str | None:
        ranks = 0
        for name in names:
            for which, known in (("lora_A", FACTORS), ("lora_B", FACTORS), ("lora_dropout", DROPOUTS)):
                child = self._modules[which]._modules[name]
                reason = hooks.why_not_known(child, known)
                if reason is None and known is FACTORS:
                    reason = _weight_obstacle(child.weight)
                if reason is not None:
                    return f"its {which}.{name} cannot be passed over: {reason}"
            ranks += len(self._modules["lora_A"]._modules[name].weight)
        if ranks > checks.MAX_RANK:
            return f"its active adapters have {ranks} ranks together, more than {checks.MAX_RANK}"
        if not getattr(self, "cast_input_dtype_enabled", True):
            return "PEFT was told not to cast its input"
        return None


def is_linear(module: nn.Module) -> bool:
    """A LoRA linear of PEFT's own class, accelerated or not, and of no class made from it."""
    return getattr(type(module), "_plain", type(module)) is Linear


def _weight_obstacle(weight: Tensor) -> str | None:
    if type(weight) not in (Tensor, nn.Parameter):
        return f"is a {type(weight).__name__}"
    if weight.is_meta:
        return "is on meta"
    if not checks.computes_in(weight.dtype):
        return f"is {weight.dtype}"
    return None
