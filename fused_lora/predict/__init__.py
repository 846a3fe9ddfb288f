"""Predicted times of a LoRA linear on a card, by a model of its kernels: predict().

Time is that of the GPU, from a cold L2, of 16-bit products. The model's equations are in products.py (cuBLAS), csrc.py
and work.py (csrc) and unfused.py (the rest); its numbers in rates.py, with what they were fitted to and checked on.
"""

from dataclasses import dataclass

from ..cards import Card
from . import csrc, unfused
from .products import Launch, total
from .rates import Rates, rates_of

__all__ = ["CSRC_FROM", "Launch", "Prediction", "predict", "predict_triton"]

# The compute capability from which csrc's kernels are offered.
CSRC_FROM = 80


@dataclass(frozen=True)
class Prediction:
    """Launches of both passes, and those of the same linear without an adapter."""

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    frozen: tuple[Launch, Launch]

    @property
    def forward_ratio(self) -> float:
        """Forward over the frozen linear's."""
        return total(self.forward) / self.frozen[0].us

    @property
    def ratio(self) -> float:
        """Forward and backward over the frozen linear's."""
        return (total(self.forward) + total(self.backward)) / total(self.frozen)


def _csrc(M: int, K: int, N: int, r: int, card: Card, rates: Rates, itemsize: int):
    forward = csrc.launch("forward", M, N, K, r, card, rates, 0.0, itemsize)
    return (forward,), (csrc.launch("backward", M, K, N, r, card, rates, forward.us, itemsize),)


_KERNELS = {"csrc": _csrc, "triton": unfused.triton, "addmm": unfused.addmm, "frozen": unfused.frozen}


def predict(
    M: int, K: int, N: int, r: int, card: Card, kernels: str = "csrc", rates: Rates | None = None, itemsize: int = 2
) -> Prediction:
    """Launches of M tokens through a K -> N linear with an update of rank r, and their times, on a card.

    kernels: "csrc", "triton", "addmm" (torch's products) or "frozen" (no adapter). rates: those of the card's
    architecture. Raises ValueError for other kernels, and sizes below 1.
    """
    if kernels not in _KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(_KERNELS)}, got {kernels!r}")
    if min(M, K, N, r) < 1:
        raise ValueError(f"M, K, N and r must be at least 1, got {(M, K, N, r)}")
    options = (M, K, N, r, card, rates or rates_of(card.capability), itemsize)
    forward, backward = _KERNELS[kernels](*options)
    (y,), (dx,) = unfused.frozen(*options)
    return Prediction(forward, backward, (y, dx))


def predict_triton(
    M: int, K: int, N: int, r: int, card: Card, forward: tuple[str, ...], backward: tuple[str, ...], itemsize: int = 2
) -> Prediction:
    """As predict(), for Triton's launches by name, such as its launchers recorded them."""
    rates = rates_of(card.capability)
    kernels = unfused.TritonKernels(M, K, N, r, card, rates.triton_products, itemsize)
    first = kernels.launches(forward, backward=False)
    second = kernels.launches(backward, backward=True, started=total(first))
    (y,), (dx,) = unfused.frozen(M, K, N, r, card, rates, itemsize)
    return Prediction(first, second, (y, dx))
