"""LoRAMLP: a gated MLP of three LoRALinear or LoRABank layers, computed as one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import ops
from ..ops.lora_mlp import SAVE
from .hooks import has_hooks, why_alone
from .mixins import Mixin, mix
from .protocol import LoRALayer, is_bank, is_lora, together
from .straight import facts_of, is_straight

FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


@dataclass(frozen=True)
class Structure:
    """What a forward does: down(act(gate(x)) up(x)), by the names of the children; act is a child or a function."""

    gate: str
    up: str
    down: str
    activation: str
    act: str | None
    x: str  # the argument

    def layers(self, mlp: nn.Module) -> list[LoRALayer]:
        return [mlp.get_submodule(name) for name in (self.gate, self.up, self.down)]


class LoRAMLP(Mixin):
    """What a gated MLP becomes: the module itself, with a class of its own whose forward is ops.lora_mlp; of LoRABank
    layers ops.lora_segments_mlp.

    Children, parameters, buffers, hooks and attributes stay as they are, and the class is a subclass of what it was.
    The forward that it had is called instead wherever it could give something else or be faster: while a layer is
    merged, has hooks, is replaced, or drops by a rule of its own, while all modules have hooks, after the class got
    another forward, and where the kernels do not fuse such an MLP.

    save: "all", or "less" to compute act(gate) up again in the backward pass instead of keeping it.
    """

    save = "all"
    _adds = ("_structure", "_act", "save")
    _structure: Structure
    _act: tuple[tuple[nn.Module, dict], ...]  # in a tuple, since it is a child already; and its attributes

    @staticmethod
    def fuse(mlp: nn.Module, structure: Structure | None = None, save: str = "all") -> nn.Module:
        """Makes `mlp` a LoRAMLP, in place, and returns it. Raises ValueError where it cannot be one."""
        if save not in SAVE:
            raise ValueError(f"save must be one of {', '.join(SAVE)}, got {save!r}")
        structure = structure or recognise(mlp)
        if structure is None:
            raise ValueError(f"the forward of {type(mlp).__name__} is not down(act(gate(x)) * up(x))")
        reason = LoRAMLP.obstacle(structure.layers(mlp))
        if reason:
            raise ValueError(reason)
        mlp._structure = structure
        act = mlp.get_submodule(structure.act) if structure.act else None
        mlp._act = () if act is None else ((act, facts_of(act)),)
        mix(mlp, LoRAMLP)
        mlp.save = save
        return mlp

    @staticmethod
    def obstacle(layers: list[LoRALayer]) -> str | None:
        """Why gate, up and down cannot be computed as one, or None."""
        if not (all(map(is_lora, layers)) or all(map(is_bank, layers))):
            return "gate, up and down must be LoRALinear, or LoRABank"
        gate, up, down = weights = [layer.frozen_weight for layer in layers]
        if gate.shape != up.shape:
            return f"gate and up must have weights of one shape, got {tuple(gate.shape)} and {tuple(up.shape)}"
        if down.shape[1] != gate.shape[0]:
            return f"down must have in_features {gate.shape[0]}, got {down.shape[1]}"
        dtypes, devices = {layer.compute_dtype for layer in layers}, {weight.device for weight in weights}
        for name, found in (("dtype", dtypes), ("device", devices)):
            if len(found) != 1:
                return f"gate, up and down must have weights of one {name}, got {sorted(map(str, found))}"
        return None

    def why_not(self, x: Tensor) -> str | None:
        """Why the forward that it had is called for x, or None."""
        parts = self._parts(x)
        return parts if isinstance(parts, str) else None

    def _parts(self, x: Tensor) -> list[ops.Part] | list[ops.Routed] | str:
        """gate, up and down, or why the forward that it had is called for x."""
        return self.change() or together(self._structure.layers(self), x, gated=True)

    def change(self) -> str | None:
        """Why it is not what it was when it was fused, or None; whatever its layers are."""
        if not self.is_as_known():
            return "its class has another forward now"
        for act, facts in self._act:
            if self.get_submodule(self._structure.act) is not act or why_alone(act, type(act).forward):
                return "its activation was replaced or must be called"
            if any(getattr(act, name, None) != value for name, value in facts.items()):
                return "its activation was changed"
        return None

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs.get(self._structure.x)
        if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor):
            return super().forward(*args, **kwargs)
        parts = self._parts(x)
        if isinstance(parts, str):
            return super().forward(*args, **kwargs)
        options = {"activation": self._structure.activation, "save": self.save}
        if isinstance(parts[0], ops.Routed):
            return ops.lora_segments_mlp(x, *parts, **options)
        return ops.lora_mlp(x, *parts, p=self.get_submodule(self._structure.gate).dropping, **options)


def recognise(mlp: nn.Module) -> Structure | None:
    """What the forward of a module does, if that is down(act(gate(x)) up(x)) and nothing else, in training or not.

    Read off a trace of it, whatever the names, where its source could give no other one: Hugging Face's LLaMA, Mistral,
    Qwen2 and Qwen3 (SiLU), Gemma (GELU in its tanh form), and the like. The module is not changed.
    """
    if not is_straight(mlp):
        return None
    try:
        found = {_structure_of(_trace(mlp, training), mlp) for training in (False, True)}
    except Exception:  # whatever a forward may do that cannot be traced, it is no such MLP
        return None
    return found.pop() if len(found) == 1 else None


class _Calls(fx.Tracer):
    """A module's own forward, down to the calls of its children, which must all be made in one state of autograd."""

    def __init__(self):
        super().__init__()
        self.state = _autograd_state()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def create_node(self, *args, **kwargs):
        if _autograd_state() != self.state:
            raise NotImplementedError("a forward that changes autograd's state")
        return super().create_node(*args, **kwargs)


def _autograd_state() -> tuple:
    """Gradients, autocast, and what checkpointing does to saved tensors."""
    autocast = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), autocast, torch._C._autograd._top_saved_tensors_default_hooks(False)


def _trace(mlp: nn.Module, training: bool) -> list[fx.Node]:
    """The calls of a forward, made on a stand-in with the same children. Raises where the stand-in is changed by it."""
    twin = mlp.__new__(type(mlp))
    shared = ("_modules", "_parameters")
    twin.__dict__ = {name: value if name in shared else copy.deepcopy(value) for name, value in vars(mlp).items()}
    twin.training = training
    before = _plain(twin)
    nodes = list(_Calls().trace(twin).nodes)
    if _plain(twin) != before:
        raise NotImplementedError("a forward that changes its module")
    return nodes


def _plain(module: nn.Module) -> dict:
    """Attributes whose change shows."""
    kinds = (int, float, str, list, dict, tuple, set, type(None))
    return {name: copy.copy(value) for name, value in vars(module).items() if type(value) in kinds and name[0] != "_"}


def _structure_of(nodes: list[fx.Node], mlp: nn.Module) -> Structure | None:
    if len(nodes) != 7 or nodes[0].op != "placeholder" or nodes[-1].op != "output":
        return None
    x, down = nodes[0], nodes[-1].args[0]
    product = _only_argument(down)
    if product is None or getattr(product.target, "__name__", "") != "mul" or len(product.args) != 2:
        return None
    for act, up in (product.args, product.args[::-1]):
        gate = act.args[0] if isinstance(act, fx.Node) and act.args else None
        if _only_argument(gate) is x and _only_argument(up) is x:
            names, activation = (gate.target, up.target, down.target), _activation(mlp, act)
            if activation is None or len(set(names)) != 3:
                return None
            return Structure(*names, activation, act.target if act.op == "call_module" else None, x.target)
    return None


def _only_argument(node) -> fx.Node | None:
    """Of the call of a child."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0]


def _activation(mlp: nn.Module, act: fx.Node) -> str | None:
    """The name of an elementwise function, known by its values."""
    if act.op not in ("call_module", "call_function") or len(act.args) != 1:
        return None
    function: Callable = mlp.get_submodule(act.target) if act.op == "call_module" else act.target
    if isinstance(function, nn.Module) and (any(True for _ in function.parameters()) or has_hooks(function)):
        return None
    far = torch.tensor([10.0, 100.0, 1e3, 1e4])
    t = torch.cat([torch.linspace(-8, 8, 513), far, -far])
    values = function(t, **act.kwargs)
    for name, known in FUNCTIONS.items():
        if isinstance(values, Tensor) and values.shape == t.shape and torch.allclose(values, known(t), atol=1e-6):
            return name
    return None
