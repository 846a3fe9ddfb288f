"""LoRAMLP: a gated MLP of three LoRALinear layers, computed as one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .lora_group import LoRAGroup
from .lora_linear import LoRALinear

FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


class LoRAMLP(nn.Module):
    """y = down(act(gate(x)) up(x)) by ops.lora_mlp; stands where the MLP it is made of stood, with that one's children.

    names are those of gate, up and down among the children. Every other child and public attribute is kept, so that
    parameters have the same names as before. With save="less" the product act(gate) up is computed again in the
    backward pass instead of being kept. While a child is merged, has hooks or is no LoRALinear any more, the three are
    called one by one.

    Raises ValueError naming what the layers do not have in common.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, str, str], activation: str, save: str = "all"):
        super().__init__()
        layers = [mlp.get_submodule(name) for name in names]
        obstacle = self.obstacle(layers)
        if obstacle:
            raise ValueError(obstacle)
        for name, child in mlp.named_children():
            self.add_module(name, child)
        for name, value in vars(mlp).items():
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)
        self.names, self.activation, self.save = names, activation, save
        self.train(mlp.training)

    @staticmethod
    def obstacle(layers: list[nn.Module]) -> str | None:
        """Why gate, up and down cannot be computed as one, or None."""
        if not all(isinstance(layer, LoRALinear) for layer in layers):
            return "gate, up and down must be LoRALinear"
        gate, up, down = layers
        if gate.out_features != up.out_features:
            return f"gate and up must have the same out_features, got {gate.out_features} and {up.out_features}"
        if down.in_features != gate.out_features:
            return f"down must have in_features {gate.out_features}, got {down.in_features}"
        return LoRAGroup.obstacle([gate, up]) or LoRAGroup.obstacle(layers, but="in_features")

    @property
    def layers(self) -> tuple[LoRALinear, ...]:
        """gate, up and down."""
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        if any(type(layer) is not LoRALinear or layer.merged or has_hooks(layer) for layer in layers):
            gate, up, down = layers
            return down(FUNCTIONS[self.activation](gate(x)) * up(x))
        columns = (
            [getattr(layer, name) for layer in layers] for name in ("weight", "lora_A", "lora_B", "bias", "scale")
        )
        p = layers[0].lora_dropout if self.training else 0.0
        return ops.lora_mlp(x, *columns, activation=self.activation, p=p, save=self.save)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, save={self.save}"


def has_hooks(layer: nn.Module) -> bool:
    """Which only a call of its own would run."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))


class _Calls(torch.fx.Tracer):
    """A module's own forward, down to the calls of its children."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def recognise(mlp: nn.Module) -> tuple[tuple[str, str, str], str] | None:
    """The names of gate, up and down and the activation, if down(act(gate(x)) up(x)) is all that its forward does.

    Read off a trace of it, whatever the names: Hugging Face's LLaMA, Mistral, Qwen2 and Qwen3 (SiLU), Gemma (GELU in
    its tanh form), and the like.
    """
    try:
        nodes = list(_Calls().trace(mlp).nodes)
    except Exception:  # whatever a forward may do that cannot be traced, it is no such MLP
        return None
    if len(nodes) != 7 or nodes[0].op != "placeholder" or nodes[-1].op != "output":
        return None
    x, down = nodes[0], nodes[-1].args[0]
    product = _only_argument(down)
    if product is None or (product.target is not torch.mul and getattr(product.target, "__name__", "") != "mul"):
        return None
    for act, up in (product.args, product.args[::-1]):
        gate = act.args[0] if isinstance(act, torch.fx.Node) and act.args else None
        if _only_argument(gate) is x and _only_argument(up) is x:
            names, activation = (gate.target, up.target, down.target), _activation(mlp, act)
            return (names, activation) if activation and len(set(names)) == 3 else None
    return None


def _only_argument(node) -> torch.fx.Node | None:
    """Of the call of a child."""
    if not isinstance(node, torch.fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0]


def _activation(mlp: nn.Module, act: torch.fx.Node) -> str | None:
    """The name of an elementwise function, known by its values."""
    function = mlp.get_submodule(act.target) if act.op == "call_module" else act.target
    if act.op not in ("call_module", "call_function") or len(act.args) != 1:
        return None
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    t = torch.linspace(-8, 8, 513)
    values = function(t, **act.kwargs)
    for name, known in FUNCTIONS.items():
        if isinstance(values, Tensor) and values.shape == t.shape and torch.allclose(values, known(t), atol=1e-6):
            return name
    return None
