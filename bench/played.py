"""`python -m bench --as sm80|sm86`: a Hopper card plays an older one, against cuBLAS's kernels for such cards.

Every product of every variant is by mma.sync. The frozen linear and addmm_ take, for each of their products, the
fastest of cuBLAS's kernels for compute capability 8 whose stages fit that card's shared memory (cublas_sm80.py). The
package's kernels are csrc/sm80's, and Triton's lowered for that card.
"""

import os
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cublas_sm80 import CublasLt, Product
from .shapes import Shape
from .timing import FLUSH_BYTES
from .variants import FLOOR, PACKAGE, VARIANTS, Kind, Problem, Variant

SHARED_BYTES = {"sm80": 163 * 1024, "sm86": 99 * 1024}  # that a block may have


def obstacle() -> str | None:
    """Why the GPU cannot play an older card, or None."""
    if not torch.cuda.is_available():
        return "there is none"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"it has {'.'.join(map(str, capability))}"


def play(card: str) -> None:
    """From now on the package and Triton see such a card. Both ask once, at their first kernel."""
    os.environ |= {"FUSED_LORA_AS": card, "TRITON_OVERRIDE_ARCH": card}


library = cache(CublasLt)


class Products:
    """alpha lhs @ rhs + beta out of one shape, each by a kernel that is looked for when it is first asked for.

    names: of the kernels, by product.
    """

    def __init__(self, shared_bytes: int):
        self.shared_bytes = shared_bytes
        self.names: dict[str, str] = {}
        self._found: dict[str, Product] = {}

    def __call__(self, name: str, lhs: Tensor, rhs: Tensor, out: Tensor | None = None, **factors: float) -> Tensor:
        out = lhs.new_empty(lhs.shape[0], rhs.shape[1]) if out is None else out
        if name not in self._found:
            self._found[name] = self._tuned(lhs, rhs, torch.zeros_like(out), factors)
            self.names[name] = self._found[name].name
        return self._found[name](lhs, rhs, out)

    def _tuned(self, lhs: Tensor, rhs: Tensor, out: Tensor, factors: dict[str, float]) -> Product:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=out.device)
        product = Product(library(), lhs, rhs, out, **factors).tune(self.shared_bytes, flush)
        product.tensors = ()  # so that they are free when the shape has been measured
        return product


class FrozenLinear(torch.autograd.Function):
    """y = x W^T, dx = dy W."""

    @staticmethod
    def forward(ctx, x, weight, product):
        ctx.save_for_backward(weight)
        ctx.product = product
        return product("x W^T", x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return ctx.product("dy W", dy, weight), None, None


class AddmmLoRA(torch.autograd.Function):
    """As variants.AddmmLoRA."""

    @staticmethod
    def forward(ctx, x, weight, A, B, scale, product):
        xa = product("x A^T", x, A.T, alpha=scale)
        ctx.save_for_backward(x, weight, A, B, xa)
        ctx.scale, ctx.product = scale, product
        return product("+ xa B^T", xa, B.T, product("x W^T", x, weight.T), beta=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, A, B, xa = ctx.saved_tensors
        product = ctx.product
        dxa = product("dy B", dy, B, alpha=ctx.scale)
        dx = product("+ dxa A", dxa, A, product("dy W", dy, weight), beta=1.0)
        return dx, None, product("dxa^T x", dxa.T, x), product("dy^T xa", dy.T, xa), None, None


class Baselines:
    """The frozen linear and addmm_, by the same products."""

    def __init__(self, shared_bytes: int):
        self.shared_bytes = shared_bytes
        self._products: dict[Shape, Products] = {}

    def _products_of(self, problem: Problem) -> Products:
        return self._products.setdefault(problem.shape, Products(self.shared_bytes))

    def frozen(self, problem: Problem) -> Variant:
        """FrozenLinear."""
        products = self._products_of(problem)
        return Variant(lambda x: FrozenLinear.apply(x, problem.weight, products), kernels=products.names)

    def addmm(self, problem: Problem) -> Variant:
        """AddmmLoRA."""
        products, weight, A, B, scale = self._products_of(problem), problem.weight, problem.A, problem.B, problem.scale
        step = lambda x: AddmmLoRA.apply(x, weight, A, B, scale, products)  # noqa: E731
        return Variant(step, {"A": A, "B": B}, kernels=products.names)


def variants(card: str) -> dict[str, Kind]:
    """What is compared on a card that is played."""
    baselines = Baselines(SHARED_BYTES[card])
    kernels = f"cuBLAS's fastest {card} kernels"
    return {
        FLOOR: Kind(baselines.frozen, f"frozen linear, no adapter, by {kernels} (the floor)", "frozen"),
        **{name: VARIANTS[name] for name in (PACKAGE, "fused_lora_dropout", "fused_lora_triton")},
        "addmm": Kind(baselines.addmm, f"unfused, addmm_, by {kernels}"),
    }
