"""Layers that their parent calls with one x, computed together: q, k and v, or gate and up.

A call of the parent's forward has an object of its own, known to its thread alone, in which the results of those layers
wait that were not called yet. It ends with the call, whatever happens: nothing is kept on modules or between calls.
"""

import operator
import threading

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.parts import autocast_dtype
from .mixins import Mixin, mix
from .protocol import LoRALayer, together
from .reading import Groups, Reading


class _Thread(threading.local):
    def __init__(self):
        self.call: Call | None = None  # the innermost


thread = _Thread()


def output(layer: nn.Module, x: Tensor) -> Tensor | None:
    """A layer's output with its siblings', if that is how it is called now; None: the layer computes by itself."""
    call = thread.call
    if call is None or call.compiling != torch.compiler.is_compiling():
        return None
    return call.output(layer, x)


class Call:
    """One call of a parent's forward."""

    __slots__ = ("compiling", "groups", "modules", "waiting")

    def __init__(self, modules: dict[str, nn.Module], groups: Groups):
        self.modules, self.groups = modules, groups
        self.compiling = torch.compiler.is_compiling()
        self.waiting: list[tuple[nn.Module, Tensor, tuple, tuple]] = []  # layers, outputs, what these are of

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        for i, (waiting, y, tensors, state) in enumerate(self.waiting):
            if waiting is layer:
                del self.waiting[i]
                now = (x, *layer.lora_sources())
                same = len(now) == len(tensors) and all(map(operator.is_, now, tensors))
                return y if same and state == _state(layer, now) and layer.why_not() is None else None
        for names in self.groups:
            if self.modules.get(names[0]) is layer:
                return self._compute([self.modules.get(name) for name in names], x)
        return None

    def _compute(self, layers: list[LoRALayer | None], x: Tensor) -> Tensor | None:
        parts = together(layers, x)
        if isinstance(parts, str):
            return None
        first, *others = layers
        y, *ys = ops.lora_group(x, parts, first.dropping)
        for layer, own in zip(others, ys, strict=True):
            tensors = (x, *layer.lora_sources())
            self.waiting.append((layer, own, tensors, _state(layer, tensors)))
        return y


def _state(layer: LoRALayer, tensors: tuple) -> tuple:
    """What an output depends on besides x and its layer's tensors. Under torch.compile these have no versions."""
    modes = (torch.is_grad_enabled(), autocast_dtype(tensors[0]), layer.dropping)
    if torch.compiler.is_compiling():
        return modes
    versions = [_version(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return (*modes, torch._C._autograd._top_saved_tensors_default_hooks(False), *versions)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class LoRASiblings(Mixin):
    """A module whose forward calls some of its layers with one x: they are computed together where they can be.

    Its forward is what it was, and so are its layers. Which of them get one unmodified x was read off its source
    (reading.py). A layer that has hooks, is merged or was replaced, or has a forward of its own computes by itself.

    Their results have one backward pass: where it runs for each of them apart, all but the last want retain_graph=True.
    """

    _adds = ("_reading",)
    _reading: Reading

    @staticmethod
    def join(module: nn.Module, reading: Reading) -> None:
        module._reading = reading
        mix(module, LoRASiblings)

    def forward(self, *args, **kwargs):
        groups = self._reading.groups(self, args, kwargs) if self.is_as_known() else ()
        if not groups:
            return super().forward(*args, **kwargs)
        outer, thread.call = thread.call, Call(self._modules, groups)
        try:
            return super().forward(*args, **kwargs)
        finally:
            thread.call = outer
