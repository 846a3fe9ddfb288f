"""AcceleratedLinear: what a LoRA linear of PEFT becomes, and the rule by which each of its calls is computed."""

from collections.abc import Sequence

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ... import checks, ops
from ...modules import hooks, siblings
from ...modules.attributes import parameter
from ...modules.magnitudes import gain
from ...modules.mixins import Mixin
from ...modules.protocol import PLAIN
from ...modules.routing import BASE
from ...modules.scaled import scale_beside
from ...ops.autograd import watched
from .by_name import Copies, Named, kernel_obstacle, obstacle

# Modules that a layer holds and a kernel computes for, by the forwards that they are known for.
BASES = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}
FACTORS = {nn.Linear: nn.Linear.forward}
DORA = {DoraLinearLayer: DoraLinearLayer.forward}
DROPOUTS = {nn.Identity: nn.Identity.forward, nn.Dropout: nn.Dropout.forward}

# A, B, the bias of lora_B, its name, by which probability it drops now
Adapter = tuple[Tensor, Tensor, Tensor | None, str, float]


class AcceleratedLinear(Mixin):
    """A peft.tuners.lora.Linear whose forward is ops.lora_linear wherever that gives the same:

        y = gain (x W^T + sum over active adapters of scaling dropout(x) A^T B^T) + bias, gain 1 but for DoRA

    Its children, parameters and attributes are PEFT's, and so are its other methods. In every call _active decides:
    what it has a word for is computed by the forward that PEFT gave the class. Where several adapters are active,
    their factors are computed as one pair of the sum of their ranks. Where samples name their adapters, it is
    ops.lora_segments on copies of the factors (by_name.py).
    """

    _adds = ("_copies", "_scales")
    _copies: Copies
    # By adapter: the number that PEFT has, for a weight of which dtype and where, and the tensor that kernels read.
    _scales: dict[str, tuple[float, torch.dtype, torch.device, Tensor]]

    def forward(self, x: Tensor, *args, **kwargs):
        if args or kwargs or type(x) not in PLAIN:
            routed = None if args or kwargs.keys() != {"adapter_names"} else self._routed(x, kwargs["adapter_names"])
            return super().forward(x, *args, **kwargs) if routed is None else ops.lora_segments(x, [routed])[0]
        if siblings.thread.call is not None:
            y = siblings.output(self, x)
            if y is not None:
                return y
        adapters = self._active()
        if isinstance(adapters, str):
            return super().forward(x)
        weight, A, B, bias, scale, _, gain = self._part(adapters)
        return ops.lora_linear(x, weight, A, B, bias, scale, adapters[0][-1], None, gain)

    # What modules/protocol.py asks of any layer. `merged` is PEFT's.

    @property
    def frozen_weight(self) -> Tensor:
        """The base's as nn.Linear has it; where it has no matrix now (sharded, packed), one that has its size alone."""
        weight = getattr(self._modules["base_layer"], "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return self._weight()
        like = weight if isinstance(weight, Tensor) else torch.empty(0)
        return like.new_empty(1, 1).expand(self.out_features, self.in_features)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The base's."""
        return self.frozen_weight.dtype

    @property
    def dropping(self) -> float:
        """The probability by which it drops now."""
        names = self._names()
        return self._dropping(names[0]) if names else 0.0  # where they differ, why_not has a word for it

    def lora_part(self) -> ops.Part:
        """Of one adapter its own tensors. Several are one of as many ranks, with their scales in B."""
        return self._part(self._active())

    def lora_sources(self) -> tuple:
        """The parameters and the scales."""
        base, modules = self._modules["base_layer"], self._modules
        found = [parameter(base, "weight"), parameter(base, "bias")]
        for name in self._names():
            B = modules["lora_B"]._modules[name]
            found += parameter(modules["lora_A"]._modules[name], "weight"), parameter(B, "weight")
            found += parameter(B, "bias"), self.scaling[name], self._magnitudes(name)
        return tuple(found)

    def why_not(self) -> str | None:
        """Why PEFT's own forward computes it now, or None."""
        adapters = self._active()
        return adapters if isinstance(adapters, str) else None

    def offered(self, x: Tensor) -> ops.Part | str:
        """Its part, to be computed in its place; or why nobody may compute it but by calling it."""
        adapters = self._active()
        if isinstance(adapters, str):
            return adapters
        return hooks.why_alone(self, type(self).forward) or self._part(adapters)

    # Samples that name their adapters.

    def why_not_by_name(self) -> str | None:
        """Why PEFT's own forward computes batches in evaluation whose samples name all of its adapters, or None."""
        adapters, weight = self._named(list(self._modules["lora_A"]._modules)), self.frozen_weight
        return adapters if isinstance(adapters, str) else kernel_obstacle(weight.new_empty(0), weight, adapters)

    def _named(self, names: list[str]) -> list[Named] | str:
        """Adapters of which each sample has one, or why PEFT's own forward computes them."""
        found, named = self._active(names), []
        for A, B, bias, name, p in () if isinstance(found, str) else found:
            named.append(Named(name, A, B, self.scaling[name], p))
            reason = obstacle(named[-1], bias, self.use_dora.get(name))
            if reason is not None:
                return reason
        return named or found

    def _routed(self, x: Tensor, names: Sequence[str] | None) -> ops.Routed | None:
        """What x's samples have by their names; None where PEFT's own forward computes them, or has an error."""
        if not names or type(x) not in PLAIN or x.dim() < 2 or len(x) != len(names) or _is_recorded(x):
            return None
        own = self._modules["lora_A"]._modules
        adapters = self._named([name for name in dict.fromkeys(names) if name in own and name != BASE])
        if isinstance(adapters, str) or any(adapter.dropping for adapter in adapters):
            return None
        weight, bias = self._weight(), parameter(self._modules["base_layer"], "bias")
        if kernel_obstacle(x, weight, adapters) is not None:
            return None
        return self._copies.routed(x, weight, bias, names, adapters, own)

    # Which adapters take part. All of it runs in every call, so attributes are read where nn.Module keeps them: its own
    # way to them takes the host as long as the rest.

    def _names(self) -> list[str]:
        """The active adapters that it has."""
        active, own = self._active_adapter, self._modules["lora_A"]._modules
        if isinstance(active, str):
            return [active] if active in own else []
        return [name for name in active if name in own]

    def _dropping(self, name: str) -> float:
        return _dropping(self._modules["lora_dropout"]._modules[name])

    def _active(self, named: list[str] | None = None) -> list[Adapter] | str:
        """The adapters that a kernel computes, or why PEFT's own forward computes the layer. named: others than the
        active ones, that do not add up."""
        if not self.is_as_known():
            return "its class has another forward now"
        if self._disable_adapters:
            return "its adapters are disabled"
        if self.merged_adapters:
            return f"merged: {', '.join(self.merged_adapters)}"
        names = self._names() if named is None else named
        if not names:
            return "none of its adapters is active"
        reason = hooks.why_none_alone() or self._variant(names) or _base_obstacle(self._modules["base_layer"])
        if reason is not None:
            return reason
        modules, adapters, ranks = self._modules, [], 0
        for name in names:
            lora_B, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
            A, B = _weight_of(modules["lora_A"]._modules[name], FACTORS), _weight_of(lora_B, FACTORS)
            for found in (A, B, hooks.why_not_known(dropout, DROPOUTS)):
                if type(found) is str:
                    return f"a module of its adapter {name} cannot be passed over: {found}"
            adapters.append((A, B, parameter(lora_B, "bias"), name, _dropping(dropout)))
            ranks += A.shape[0]
        if named is not None:
            return adapters
        if ranks > checks.MAX_RANK:
            return f"its active adapters have {ranks} ranks, more than {checks.MAX_RANK}"
        if len(names) > 1 and any(p for *_, p in adapters):
            return "several adapters are active, and each drops by a mask of its own"
        return adapters

    def _variant(self, names: list[str]) -> str | None:
        """What else than LoRA an active adapter is, or that PEFT computes in dtypes of its own."""
        variants = self.__dict__.get("lora_variant", ())  # PEFT before 0.16 has use_dora alone
        for name in names:
            if self.use_dora.get(name):
                reason = self._dora_obstacle(name, len(names))
                if reason is not None:
                    return f"adapter {name} is DoRA, and {reason}"
            elif name in variants:
                return f"adapter {name} is no plain LoRA but {type(variants[name]).__name__}"
        return None if self.cast_input_dtype_enabled else "PEFT was told not to cast its input"

    def _dora_obstacle(self, name: str, active: int) -> str | None:
        """Why DoRA's gain of a sum is not what PEFT computes."""
        if active > 1:
            return "others are active beside it"
        if self._dropping(name):
            return "PEFT drops what its base reads too"
        dora = self._modules["lora_magnitude_vector"]._modules[name]
        magnitudes = _weight_of(dora, DORA)
        return magnitudes if isinstance(magnitudes, str) else None

    def _magnitudes(self, name: str) -> Tensor | None:
        """Of an adapter that is DoRA."""
        if not self.use_dora.get(name):
            return None
        return parameter(self._modules["lora_magnitude_vector"]._modules[name], "weight")

    def _weight(self) -> Tensor:
        """Conv1D's is the transpose of what it has."""
        base = self._modules["base_layer"]
        weight = parameter(base, "weight")
        return weight.t() if type(base) is Conv1D else weight

    def _part(self, adapters: list[Adapter]) -> ops.Part:
        weight, bias = self._weight(), parameter(self._modules["base_layer"], "bias")
        A, B, own, name, _ = adapters[0]
        if len(adapters) == 1 and own is None:
            scale, magnitudes = self._scale(name, weight), self._magnitudes(name)
            gains = None if magnitudes is None else gain(magnitudes, weight, A, B, scale)
            return ops.Part(weight, A, B, bias, scale, None, gains)
        scales = [self._scale(name, weight) for *_, name, _ in adapters]
        for (_, _, own, *_), scale in zip(adapters, scales, strict=True):
            if own is not None:
                bias = own * scale if bias is None else bias + own * scale
        if len(adapters) == 1:
            return ops.Part(weight, A, B, bias, scales[0])
        As = [A for A, *_ in adapters]
        scaled = [B * scale for (_, B, *_), scale in zip(adapters, scales, strict=True)]
        return ops.Part(weight, torch.cat(As), torch.cat(scaled, 1), bias, self._known_scale("", 1.0, weight))

    def _scale(self, name: str, weight: Tensor) -> Tensor:
        """What PEFT has as a number, or as a tensor where adapters are to be exchanged in compiled code."""
        scaling = self.scaling[name]
        if not isinstance(scaling, Tensor):
            return self._known_scale(name, scaling, weight)
        return scaling.to(weight.device, checks.scale_dtype(weight))

    def _known_scale(self, name: str, scaling: float, weight: Tensor) -> Tensor:
        """The same tensor as long as the number is the same and the weight stays where it is."""
        known = self._scales.get(name)
        if known is not None and known[0] == scaling and known[1] is weight.dtype and known[2] == weight.device:
            return known[3]
        scale = scale_beside(scaling, weight)
        if not torch.compiler.is_compiling():  # a compiled call's is of its graph, and perhaps of inference mode
            self._scales[name] = scaling, weight.dtype, weight.device, scale
        return scale

    def ready(self) -> None:
        """Makes the scales, so that compiled calls find them."""
        weight = self._weight()
        self._known_scale("", 1.0, weight)
        for name, scaling in self.scaling.items():
            if not isinstance(scaling, Tensor):
                self._known_scale(name, scaling, weight)


def is_linear(module: nn.Module) -> bool:
    """A LoRA linear of PEFT's own class, accelerated or not, and of no class made from it."""
    return getattr(type(module), "_plain", type(module)) is Linear


def _is_recorded(x: Tensor) -> bool:
    """Whether what is computed now is computed again elsewhere, where nobody sees that factors have changed, or by
    factors that have no memory."""
    return torch.compiler.is_compiling() or watched() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _dropping(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _base_obstacle(base: nn.Module) -> str | None:
    weight = _weight_of(base, BASES)
    if isinstance(weight, str):
        return f"its base cannot be passed over: {weight}"
    if weight.requires_grad and torch.is_grad_enabled():
        return "its base cannot be passed over: its weight requires gradients"
    return None


def _weight_of(module: nn.Module, known: dict) -> Tensor | str:
    """The weight of a module of a known class, or why nobody may compute by it."""
    reason = hooks.why_not_known(module, known)
    if reason is not None:
        return reason
    weight = parameter(module, "weight")
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "its weight is on meta"
    return weight if weight.dtype in checks.COMPUTE_DTYPES else f"its weight is {weight.dtype}"
