"""Launches of the other ways: the frozen linear, torch's products with addmm_, and the Triton kernels.

frozen   forward y = x W^T; backward dx = dy W
addmm    x A^T, y, y += xa B^T; dy B, dx, dx += dxa A, dxa^T x, dy^T xa
triton   shrink, expand; shrink, expand and the gradients: on Hopper in one launch, where they also fill the SMs
         that the last wave of tiles leaves idle
"""

from math import ceil

from ..cards import Card
from .products import Launch, cublas_widths, product, thin, tiling_of, total
from .rates import Products, Rates

Pass = tuple[Launch, ...]


def frozen(M: int, K: int, N: int, r: int, card: Card, rates: Rates, itemsize: int) -> tuple[Pass, Pass]:
    forward = product("x W^T", M, N, K, card, rates.cublas, 0.0, itemsize)
    return (forward,), (product("dy W", M, K, N, card, rates.cublas, forward.us, itemsize),)


def addmm(M: int, K: int, N: int, r: int, card: Card, rates: Rates, itemsize: int) -> tuple[Pass, Pass]:
    (y,), (dx,) = frozen(M, K, N, r, card, rates, itemsize)

    def of(name: str, columns: int, reads: int = 1) -> Launch:
        return thin(name, M, columns, r, card, rates.cublas, itemsize, reads)

    forward = of("x A^T", K), y, of("y += xa B^T", N, 2)
    return forward, (of("dy B", N), dx, of("dx += dxa A", K, 2), of("dxa^T x", K), of("dy^T xa", N))


def triton(M: int, K: int, N: int, r: int, card: Card, rates: Rates, itemsize: int) -> tuple[Pass, Pass]:
    grads = ("expand_grads_kernel",) if card.capability >= 90 else ("expand_kernel", "factor_grads_kernel")
    kernels = TritonKernels(M, K, N, r, card, rates.triton_products, itemsize)
    forward = kernels.launches(("shrink_kernel", "expand_kernel"), backward=False)
    names = ("shrink_kernel", *grads, "reduce_splits_kernel")
    return forward, kernels.launches(names, backward=True, started=total(forward))


class TritonKernels:
    """Launches by the names of fused_lora/kernels, of one shape on one card."""

    def __init__(self, M: int, K: int, N: int, r: int, card: Card, products: Products, itemsize: int):
        self.M, self.K, self.N, self.r = M, K, N, r
        self.card, self.products, self.itemsize = card, products, itemsize

    def launches(self, names: tuple[str, ...], backward: bool, started: float = 0.0) -> Pass:
        """One after another; what has no model costs a launch."""
        made = []
        for name in names:
            made.append(self._launch(name, backward, started + total(made)))
        return tuple(made)

    def _launch(self, name: str, backward: bool, started: float) -> Launch:
        columns, depth = (self.K, self.N) if backward else (self.N, self.K)
        if name == "shrink_kernel":
            return self._thin(name, depth)
        if name == "expand_kernel":
            return self._expand(name, columns, depth, started)
        if name == "factor_grads_kernel":
            return self._gradients(name)
        if name == "expand_grads_kernel":
            return self._expand_with_gradients(name, columns, depth, started)
        return Launch(name, 0, 0, self.products.launch)

    def _thin(self, name: str, width: int) -> Launch:
        return thin(name, self.M, width, self.r, self.card, self.products, self.itemsize)

    def _expand(self, name: str, columns: int, depth: int, started: float) -> Launch:
        """Ranks are more of its depth."""
        return product(name, self.M, columns, depth + self.r, self.card, self.products, started, self.itemsize)

    def _gradients(self, name: str) -> Launch:
        dA, dB = self._thin(name, self.K), self._thin(name, self.N)
        return Launch(name, dA.flops + dB.flops, dA.bytes + dB.bytes, dA.us + dB.us - self.products.launch)

    def _expand_with_gradients(self, name: str, columns: int, depth: int, started: float) -> Launch:
        tiles, gradients = self._expand(name, columns, depth, started), self._gradients(name)
        tiling = tiling_of(self.card)
        waves = tiling.waves(self.M, columns, tiling.width(self.M, columns, cublas_widths(self.card)))
        idle = (1 - waves / ceil(waves)) * tiles.us
        us = tiles.us + max(0.0, gradients.us - self.products.launch - idle)
        return Launch(name, tiles.flops + gradients.flops, tiles.bytes + gradients.bytes, us)
