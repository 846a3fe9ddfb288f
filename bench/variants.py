"""What is timed: one factory for each way to train a LoRA linear, each on the same tensors.

The unfused formula is a baseline here and no reference: check.py holds every variant to fused_lora.reference.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fused_lora import LoRALinear, backends, lora_linear

from .shapes import Shape

# lora_alpha / r. Not 1, so that a forgotten scale shows.
SCALE = 0.75
DROPOUT, SEED = 0.1, 2**40 + 5  # of the update's input where a variant drops, and whose mask


@dataclass
class Problem:
    """x (M, K), weight (N, K), A (r, K), B (N, r), dy (M, N): random and of one dtype, scale a float."""

    shape: Shape
    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    scale: float = SCALE

    @property
    def lora_alpha(self) -> float:
        return self.scale * self.shape.r

    @property
    def magnitudes(self) -> Tensor:
        """DoRA's, around the norms of the rows, which are about 1.5."""
        return torch.linspace(1, 2, self.shape.N, device=self.x.device, dtype=self.x.dtype)


def make_problem(shape: Shape, device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Normal data, scaled so that the update is as large as the base product: an error in either shows in every result.

    x, A and B ask for gradients; weight is frozen.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype).mul_(std)

    M, K, N, r = shape.M, shape.K, shape.N, shape.r
    return Problem(
        shape,
        x=normal(M, K, 1).requires_grad_(),
        weight=normal(N, K, K**-0.5),
        A=normal(r, K, K**-0.5).requires_grad_(),
        B=normal(N, r, r**-0.5).requires_grad_(),
        dy=normal(M, N, 1),
    )


@dataclass
class Variant:
    """step(x) -> y, and what it trains: parameters by name ("A" and "B", or "weight", or nothing).

    backend: this package's, instead of the one that it chooses. kernels: by product, where the variant has chosen them.
    """

    step: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    backend: str | None = None
    kernels: dict[str, str] = field(default_factory=dict)


def frozen_linear(problem: Problem) -> nn.Linear:
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    return linear


def frozen(problem: Problem) -> Variant:
    """y = x W^T, dx = dy W: an nn.Linear with no adapter at all."""
    return Variant(frozen_linear(problem))


def full_rank(problem: Problem) -> Variant:
    """y = x W^T, dx = dy W, dW = dy^T x."""
    weight = problem.weight.detach().requires_grad_()
    return Variant(lambda x: F.linear(x, weight), {"weight": weight})


def unfused_formula(x, weight, A, B, scale: float):
    """As everybody writes it."""
    return F.linear(x, weight) + scale * F.linear(F.linear(x, A), B)


def unfused(problem: Problem) -> Variant:
    """The formula, eager, with torch's own autograd."""
    weight, A, B, scale = problem.weight, problem.A, problem.B, problem.scale
    return Variant(lambda x: unfused_formula(x, weight, A, B, scale), {"A": A, "B": B})


def compiled(problem: Problem) -> Variant:
    """torch.compile of the same formula, default mode, static shapes."""
    weight, A, B, scale = problem.weight, problem.A, problem.B, problem.scale
    formula = torch.compile(unfused_formula, dynamic=False, fullgraph=True)
    return Variant(lambda x: formula(x, weight, A, B, scale), {"A": A, "B": B})


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)
    # With beta=0 the uninitialised memory is never read.
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """In place, but where it is compiled: torch 2.11 makes zeros of such gradients on a GPU."""
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


class AddmmLoRA(torch.autograd.Function):
    """The best honest unfused torch: no elementwise pass over (M, N) or (M, K), the scale inside the GEMMs."""

    @staticmethod
    def forward(ctx, x, weight, A, B, scale):
        xa = _scaled_product(x, A.T, scale)
        ctx.save_for_backward(x, weight, A, B, xa)
        ctx.scale = scale
        return _add_product(F.linear(x, weight), xa, B.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B, xa = ctx.saved_tensors
        dxa = _scaled_product(dy, B, ctx.scale)
        return _add_product(dy @ weight, dxa, A), None, dxa.T @ x, dy.T @ xa, None


def addmm(problem: Problem) -> Variant:
    """AddmmLoRA: addmm_ in place for both low-rank updates."""
    weight, A, B, scale = problem.weight, problem.A, problem.B, problem.scale
    return Variant(lambda x: AddmmLoRA.apply(x, weight, A, B, scale), {"A": A, "B": B})


class MergedWeightLoRA(torch.autograd.Function):
    """W' = W + scale B A, y = x W'^T, dx = dy W', dB = dy^T (x A^T) scale, dA = scale (dy B)^T x.

    W' is formed anew in backward, as RunLoRA does (Cherniuk et al. 2023, arXiv:2312.03415): keeping it would double
    the weights' memory. In bf16 it rounds away updates smaller than half a unit in the last place of W.
    """

    @staticmethod
    def forward(ctx, x, weight, A, B, scale):
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, B, A, alpha=scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        dx = dy @ torch.addmm(weight, B, A, alpha=ctx.scale)
        dA = ((dy @ B).T @ x).mul_(ctx.scale)
        dB = (dy.T @ (x @ A.T)).mul_(ctx.scale)
        return dx, None, dA, dB, None


def merged_weight(problem: Problem) -> Variant:
    """MergedWeightLoRA: one GEMM on W + scale B A."""
    weight, A, B, scale = problem.weight, problem.A, problem.B, problem.scale
    return Variant(lambda x: MergedWeightLoRA.apply(x, weight, A, B, scale), {"A": A, "B": B})


def _peft(problem: Problem, autocast_adapter_dtype: bool, use_dora: bool = False) -> Variant:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.shape.r, lora_alpha=problem.lora_alpha, lora_dropout=0.0, use_dora=use_dora, target_modules=["linear"]
    )
    model = nn.Sequential()
    model.add_module("linear", frozen_linear(problem))
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model.linear
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(problem.A)
        B.copy_(problem.B)
    trained = {"A": A, "B": B}
    if use_dora:
        trained["magnitudes"] = layer.lora_magnitude_vector["default"].weight
        trained["magnitudes"].data = problem.magnitudes
    return Variant(layer, trained)


def peft(problem: Problem) -> Variant:
    """PEFT's layer, called directly, with A and B in x's dtype."""
    return _peft(problem, autocast_adapter_dtype=False)


def peft_fp32(problem: Problem) -> Variant:
    """PEFT's default: A and B in float32 on a 16-bit base, and the adapter's branch in float32."""
    return _peft(problem, autocast_adapter_dtype=True)


def peft_dora(problem: Problem) -> Variant:
    """PEFT's layer with use_dora, A and B in x's dtype."""
    return _peft(problem, autocast_adapter_dtype=False, use_dora=True)


def _layer(problem: Problem, **options) -> LoRALinear:
    layer = LoRALinear.from_linear(frozen_linear(problem), problem.shape.r, problem.lora_alpha, **options)
    with torch.no_grad():
        layer.lora_A.copy_(problem.A)
        layer.lora_B.copy_(problem.B)
    return layer


def fused_lora(problem: Problem) -> Variant:
    """This package's module."""
    layer = _layer(problem)
    return Variant(layer, {"A": layer.lora_A, "B": layer.lora_B})


def fused_lora_dora(problem: Problem) -> Variant:
    """The module with use_dora."""
    layer = _layer(problem, use_dora=True)
    layer.lora_magnitude_vector.data = problem.magnitudes
    return Variant(layer, {"A": layer.lora_A, "B": layer.lora_B, "magnitudes": layer.lora_magnitude_vector})


def fused_lora_triton(problem: Problem) -> Variant:
    """The same module on its Triton kernels, where it would choose csrc's."""
    if backends.choose(problem.x.device, problem.x.dtype).name != "cuda":
        raise ImportError("where the CUDA kernels do not run, fused_lora itself is on Triton if there is a GPU for it")
    variant = fused_lora(problem)
    return Variant(variant.step, variant.parameters, backend="triton")


def fused_lora_dropout(problem: Problem) -> Variant:
    """The module's function with dropout. Its mask is a seed's, so that the reference has the same one."""
    weight, A, B = problem.weight, problem.A, problem.B
    scale, seed = (torch.tensor(value, device=weight.device) for value in (problem.scale, SEED))
    return Variant(lambda x: lora_linear(x, weight, A, B, None, scale, DROPOUT, seed), {"A": A, "B": B})


@dataclass(frozen=True)
class Kind:
    """A factory, its name in tables, and the work (see shapes.py) that its FLOPs and results are those of."""

    factory: Callable[[Problem], Variant]
    label: str
    work: str = "lora"


FLOOR, PACKAGE = "frozen", "fused_lora"
VARIANTS = {
    FLOOR: Kind(frozen, "frozen linear, no adapter (the floor)", "frozen"),
    PACKAGE: Kind(fused_lora, "**fused_lora**"),
    "fused_lora_dropout": Kind(fused_lora_dropout, f"fused_lora, dropout of {DROPOUT}", "dropout"),
    "fused_lora_dora": Kind(fused_lora_dora, "fused_lora, DoRA", "dora"),
    "fused_lora_triton": Kind(fused_lora_triton, "fused_lora, Triton backend"),
    "addmm": Kind(addmm, "unfused, addmm_"),
    "merged_weight": Kind(merged_weight, "W' = W + sBA, one GEMM"),
    "compiled": Kind(compiled, "unfused, torch.compile"),
    "unfused": Kind(unfused, "unfused, eager"),
    "peft": Kind(peft, "PEFT, adapters in x's dtype"),
    "peft_fp32": Kind(peft_fp32, "PEFT default (fp32 adapters)"),
    "peft_dora": Kind(peft_dora, "PEFT, DoRA", "dora"),
    "full_rank": Kind(full_rank, "full-rank (dX and dW)", "full_rank"),
}


def run(variant: Variant, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    """One step: (y,), or (y, dx, a gradient for each parameter). Gradients are returned, so no .grad needs clearing.

    The forward alone keeps what its backward would need: it is training's forward.
    """
    if variant.backend is None:
        return _step(variant, problem, backward)
    with backends.forcing(variant.backend):
        return _step(variant, problem, backward)


def _step(variant: Variant, problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    y = variant.step(problem.x)
    if not backward:
        return (y,)
    return (y, *torch.autograd.grad(y, (problem.x, *variant.parameters.values()), problem.dy))
