"""The blocks of layers that are timed, and the ways to compute them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import replace_linear
from fused_lora.pretrain.llama import MLP, LlamaConfig
from fused_lora.reference import lora_linear_ref, lora_mlp_ref

from .step_arms import Unfused, factors, freeze_linears, with_formula
from .variants import FLOOR, PACKAGE, SCALE, unfused_formula

ALONE, LESS, UNFUSED = "alone", "less", "unfused"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Projections(nn.Module):
    """Linears that read one x, called as models call them."""

    def __init__(self, K: int, widths: tuple[int, ...]):
        super().__init__()
        for name, N in zip(PROJECTIONS[: len(widths)], widths, strict=True):
            self.add_module(name, nn.Linear(K, N, bias=False))


class One(Projections):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.q_proj(x),)


class Two(Projections):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x)


class Three(Projections):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@dataclass(frozen=True)
class Block:
    """M tokens through up to three linears K -> N, one for each N of widths; gated: through an MLP K -> N -> K."""

    M: int
    K: int
    widths: tuple[int, ...]
    gated: bool = False
    r: int = 128

    def __post_init__(self):
        most = 1 if self.gated else len(PROJECTIONS)
        if not 1 <= len(self.widths) <= most:
            raise ValueError(f"widths must be 1 to {most}, got {self.widths}")

    def __str__(self) -> str:
        layers = f"{self.K} -> {', '.join(map(str, self.widths))}"
        return f"{self.M} tokens, " + (f"MLP {layers} -> {self.K}" if self.gated else layers)

    @property
    def out_widths(self) -> tuple[int, ...]:
        """Columns of each output."""
        return (self.K,) if self.gated else self.widths

    @property
    def count(self) -> int:
        """Of its linears."""
        return 3 if self.gated else len(self.widths)

    def plain(self) -> nn.Module:
        """It, of nn.Linear."""
        if not self.gated:
            return (One, Two, Three)[len(self.widths) - 1](self.K, self.widths)
        return MLP(LlamaConfig(self.K, *self.widths, num_hidden_layers=1, num_attention_heads=1))

    def ways(self) -> list[str]:
        """Names of those that exist here."""
        return [name for name, way in WAYS.items() if way.exists(self)]


INTO, OUT_OF = Block(16384, 2048, (5504,)), Block(16384, 5504, (2048,))
# A width that is no multiple of 8, and the same block beside it whose width is one.
NEIGHBOURS = {replace(INTO, widths=(5461,)): INTO, replace(OUT_OF, K=5461): OUT_OF}
GPU_BLOCKS = (
    Block(16384, 2048, (2048, 2048, 2048)),
    Block(16384, 2048, (2048, 512, 512)),
    Block(16384, 2048, (5504,), gated=True),
    Block(16384, 2048, (5461,), gated=True),
    Block(24576, 1024, (2736,), gated=True),
    *(block for pair in NEIGHBOURS.items() for block in reversed(pair)),
)
CPU_BLOCKS = (Block(32, 64, (64, 32), r=8), Block(32, 64, (85,), gated=True, r=8), Block(32, 85, (64,), r=8))


def _frozen(layers: nn.Module, block: Block) -> None:
    freeze_linears(layers)


def _alone(layers: nn.Module, block: Block) -> None:
    replace_linear(layers, block.r, SCALE * block.r, fuse="off")


def _fused(layers: nn.Module, block: Block) -> None:
    report = replace_linear(layers, block.r, SCALE * block.r)
    if block.count > 1 and not (report.mlps if block.gated else report.groups):
        raise RuntimeError(f"{block} was not fused: {report}")


def _less(layers: nn.Module, block: Block) -> None:
    _fused(layers, block)
    layers.save = "less"


def _unfused(layers: nn.Module, block: Block) -> None:
    with_formula(layers, block.r, SCALE, unfused_formula)


@dataclass(frozen=True)
class Way:
    """What a block's nn.Linear layers become, in place.

    compiled: the whole block is, by torch.compile. adapters: there are some. exists: whether a block has it.
    """

    label: str
    convert: Callable[[nn.Module, Block], None]
    compiled: bool = True
    adapters: bool = True
    exists: Callable[[Block], bool] = lambda block: True


WAYS = {
    FLOOR: Way("frozen, no adapters (the floor), compiled", _frozen, adapters=False),
    PACKAGE: Way("**fused_lora**", _fused, compiled=False),
    LESS: Way('fused_lora, `save="less"`', _less, compiled=False, exists=lambda block: block.gated),
    ALONE: Way("fused_lora, layer by layer, compiled", _alone, exists=lambda block: block.count > 1),
    UNFUSED: Way("unfused, compiled", _unfused),
}


@dataclass
class Inputs:
    """x (M, K), and the gradients of a block's outputs."""

    x: Tensor
    dys: list[Tensor]

    @classmethod
    def make(cls, block: Block, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """Normal, x asking for its gradient."""
        generator = torch.Generator(device).manual_seed(1)

        def normal(columns: int) -> Tensor:
            return torch.randn(block.M, columns, generator=generator, device=device, dtype=dtype)

        return cls(normal(block.K).requires_grad_(), [normal(N) for N in block.out_widths])


def build(block: Block, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same weights and factors by every way; the update about as large as the base product."""
    generator = torch.Generator(device).manual_seed(0)
    with device:
        layers = block.plain().to(dtype)
    with torch.no_grad():
        for weight in layers.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        WAYS[name].convert(layers, block)
        for A, B in factors(layers):
            A.normal_(std=A.shape[1] ** -0.5, generator=generator)
            B.normal_(std=B.shape[1] ** -0.5, generator=generator)
    return layers


def run_block(layers: nn.Module, inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    """Outputs; and with backward the gradients of x and of each A and B."""
    found = layers(inputs.x)
    ys = found if isinstance(found, tuple) else (found,)
    if not backward:
        return ys
    trained = [factor for pair in factors(layers) for factor in pair]
    return (*ys, *torch.autograd.grad(ys, [inputs.x, *trained], inputs.dys))


def expected_results(block: Block, adapters: bool, inputs: Inputs) -> dict[str, Tensor]:
    """What run_block returns, by name, from fused_lora.reference one precision up: in float32 for 16 bits."""
    dtype = inputs.x.dtype
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    layers = build(block, UNFUSED, inputs.x.device, dtype).to(wide)
    parts = [
        {"weight": linear.weight, "A": linear.lora_A, "B": linear.lora_B, "scale": SCALE if adapters else 0.0}
        for linear in layers.modules()
        if isinstance(linear, Unfused)
    ]
    x = inputs.x.detach().to(wide).requires_grad_()
    ys = [lora_mlp_ref(x, *parts, F.silu)] if block.gated else [lora_linear_ref(x, **part) for part in parts]
    trained = {f"{factor}{i}": part[factor] for i, part in enumerate(parts) for factor in "AB" if adapters}
    grads = torch.autograd.grad(ys, [x, *trained.values()], [dy.to(wide) for dy in inputs.dys])
    names = [*(f"y{i}" for i in range(len(ys))), "x", *trained]
    return dict(zip(names, [*(y.detach() for y in ys), *grads], strict=True))
