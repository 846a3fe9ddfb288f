"""`python -m bench.blocks --as sm80|sm86`: blocks on a card that is played, as played.py plays single linears."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.pretrain.llama import MLP

from .block_ways import UNFUSED, Block, Way
from .played import SHARED_BYTES, AddmmLoRA, FrozenLinear, Products
from .step_arms import with_formula
from .variants import FLOOR, SCALE


class Frozen(nn.Module):
    """A linear without an adapter."""

    def __init__(self, weight: Tensor, products: dict[tuple, Products]):
        super().__init__()
        self.weight, self.products = weight.requires_grad_(False), products

    def forward(self, x: Tensor) -> Tensor:
        return FrozenLinear.apply(x, self.weight, self.products[x.shape, self.weight.shape])


class PlayedMLP(MLP):
    """Whose products cannot be compiled: what is between them is, as it is where the whole MLP can."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_swiglu(self.gate_proj(x), self.up_proj(x)))


@torch.compile(dynamic=False)
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def ways(card: str) -> dict[str, Way]:
    """In place of those whose products are torch's."""
    products = defaultdict(lambda: Products(SHARED_BYTES[card]))

    def frozen(layers: nn.Module, block: Block) -> None:
        for name, linear in list(layers.named_children()):
            setattr(layers, name, Frozen(linear.weight, products))
        _as_played(layers)

    def addmm(layers: nn.Module, block: Block) -> None:
        def formula(x, weight, A, B, scale):
            return AddmmLoRA.apply(x, weight, A, B, scale, products[x.shape, weight.shape, A.shape])

        with_formula(layers, block.r, SCALE, formula)
        _as_played(layers)

    kernels = f"by cuBLAS's fastest {card} kernels"
    return {
        FLOOR: Way(f"frozen, no adapters, {kernels} (the floor)", frozen, compiled=False, adapters=False),
        UNFUSED: Way(f"unfused, addmm_, {kernels}", addmm, compiled=False),
    }


def _as_played(layers: nn.Module) -> None:
    if isinstance(layers, MLP):
        layers.__class__ = PlayedMLP
