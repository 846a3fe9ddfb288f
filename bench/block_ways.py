"""The blocks of layers that are timed, and the ways to compute them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_lora import replace_linear
from fused_lora.modules.lora_mlp import LoRAMLP
from fused_lora.pretrain.llama import MLP, LlamaConfig

from .step_arms import LORA_ALPHA, factors, freeze_linears, with_formula
from .variants import FLOOR, PACKAGE, unfused_formula

ALONE, LESS, UNFUSED = "alone", "less", "unfused"


class Projections(nn.Module):
    """Up to three linears that read one x."""

    def __init__(self, K: int, widths: tuple[int, ...]):
        super().__init__()
        for name, N in zip(("q_proj", "k_proj", "v_proj"), widths, strict=False):
            self.add_module(name, nn.Linear(K, N, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(projection(x) for projection in self.children())


@dataclass(frozen=True)
class Block:
    """M tokens through a linear K -> N for each N of widths; gated: through an MLP K -> N -> K."""

    M: int
    K: int
    widths: tuple[int, ...]
    gated: bool = False
    r: int = 128

    def __str__(self) -> str:
        middle = f"{self.K} -> {', '.join(map(str, self.widths))}"
        return f"{self.M} tokens, " + (f"MLP {middle} -> {self.K}" if self.gated else middle)

    @property
    def out_widths(self) -> tuple[int, ...]:
        return (self.K,) if self.gated else self.widths

    @property
    def linears(self) -> int:
        return 3 if self.gated else len(self.widths)

    def plain(self) -> nn.Module:
        """Of nn.Linear."""
        if not self.gated:
            return Projections(self.K, self.widths)
        return MLP(LlamaConfig(self.K, *self.widths, num_hidden_layers=1, num_attention_heads=1))

    def ways(self) -> list[str]:
        """Those that exist here."""
        return [name for name, way in WAYS.items() if way.exists(self)]


GPU_BLOCKS = (
    Block(16384, 2048, (2048, 2048, 2048)),
    Block(16384, 2048, (2048, 512, 512)),
    Block(16384, 2048, (5504,), gated=True),
    Block(16384, 2048, (5461,), gated=True),
    Block(24576, 1024, (2736,), gated=True),
    Block(16384, 2048, (5504,)),
    Block(16384, 2048, (5461,)),
    Block(16384, 5504, (2048,)),
    Block(16384, 5461, (2048,)),
)
NEIGHBOURS = ((GPU_BLOCKS[6], GPU_BLOCKS[5]), (GPU_BLOCKS[8], GPU_BLOCKS[7]))
CPU_BLOCKS = (Block(32, 64, (64, 32), r=8), Block(32, 64, (85,), gated=True, r=8), Block(32, 85, (64,), r=8))


def _frozen(block: nn.Module, r: int) -> None:
    freeze_linears(block)


def _fused(block: nn.Module, r: int, fuse: str = "auto", save: str = "all") -> None:
    replace_linear(block, r=r, lora_alpha=LORA_ALPHA, fuse=fuse)
    if isinstance(block, LoRAMLP):
        block.save = save


def _alone(block: nn.Module, r: int) -> None:
    _fused(block, r, fuse="off")


def _less(block: nn.Module, r: int) -> None:
    _fused(block, r, save="less")


def _unfused(block: nn.Module, r: int) -> None:
    with_formula(block, r, unfused_formula)


@dataclass(frozen=True)
class Way:
    """What a block's nn.Linear layers become, in place. compiled: the whole block is, by torch.compile."""

    label: str
    convert: Callable[[nn.Module, int], None]
    compiled: bool = True
    adapters: bool = True
    exists: Callable[[Block], bool] = lambda block: True


WAYS = {
    FLOOR: Way("frozen, no adapters (the floor)", _frozen, adapters=False),
    PACKAGE: Way("**fused_lora**", _fused, compiled=False),
    LESS: Way('fused_lora, `save="less"`', _less, compiled=False, exists=lambda block: block.gated),
    ALONE: Way("fused_lora, layer by layer", _alone, exists=lambda block: block.linears > 1),
    UNFUSED: Way("unfused", _unfused),
}


@dataclass
class Problem:
    """x (M, K), and the gradients of a block's outputs."""

    x: Tensor
    dys: list[Tensor]

    @classmethod
    def make(cls, block: Block, device: torch.device, dtype: torch.dtype) -> "Problem":
        generator = torch.Generator(device).manual_seed(1)

        def normal(columns: int) -> Tensor:
            return torch.randn(block.M, columns, generator=generator, device=device, dtype=dtype)

        return cls(normal(block.K).requires_grad_(), [normal(N) for N in block.out_widths])

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(self.x.detach().to(dtype).requires_grad_(), [dy.to(dtype) for dy in self.dys])


def build(block: Block, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same weights and factors by every way."""
    generator = torch.Generator(device).manual_seed(0)
    with device:
        module = block.plain().to(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        WAYS[name].convert(module, block.r)
        for A, B in factors(module):
            A.normal_(std=A.shape[1] ** -0.5, generator=generator)
            B.normal_(std=B.shape[1] ** -0.5, generator=generator)
    return module


def run(module: nn.Module, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    """Outputs; and with backward the gradients of x and of each A and B."""
    found = module(problem.x)
    ys = found if isinstance(found, tuple) else (found,)
    if not backward:
        return ys
    trained = [factor for pair in factors(module) for factor in pair]
    return (*ys, *torch.autograd.grad(ys, [problem.x, *trained], problem.dys))


def reference(block: Block, adapters: bool, problem: Problem) -> dict[str, Tensor]:
    """What run returns, by name, from the formula one precision up: in float32 for 16 bits."""
    wide = torch.float32 if problem.x.dtype.itemsize == 2 else torch.float64
    module = build(block, UNFUSED if adapters else FLOOR, problem.x.device, problem.x.dtype).to(wide)
    results = [result.detach() for result in run(module, problem.to(wide), backward=True)]
    names = [f"y{i}" for i in range(len(problem.dys))] + ["x"]
    names += [f"{factor}{i}" for i in range(len(factors(module))) for factor in "AB"]
    return dict(zip(names, results, strict=True))
