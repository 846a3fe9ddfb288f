"""Right first: a variant's results against fused_lora.reference, before any of its times count."""

import torch
from torch import Tensor

from fused_lora.reference import lora_linear_ref

from .shapes import ADAPTED
from .variants import DROPOUT, SEED, Problem, Variant, run

# Relative Frobenius error, measured against one precision up (float32 for 16 bits, float64 for the rest).
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}


class WrongResultError(AssertionError):
    """A variant's result is off by more than its dtype explains, so its speed means nothing."""


def reference_results(problem: Problem, work: str) -> dict[str, Tensor]:
    """y, x's gradient and the trained parameters' by name, by torch's autograd through lora_linear_ref."""
    compute = torch.float32 if problem.x.dtype.itemsize == 2 else torch.float64
    trained = {"full_rank": ("weight",), "frozen": (), "dora": ("A", "B", "magnitudes")}
    trained = dict.fromkeys(ADAPTED, ("A", "B")) | trained
    tensors = {name: getattr(problem, name).detach().to(compute) for name in ("x", "weight", "A", "B")}
    options, magnitudes = {}, problem.magnitudes.to(compute)
    if work == "dropout":
        options = {"p": DROPOUT, "seed": torch.tensor(SEED, device=problem.x.device)}
    elif work == "dora":
        sums = tensors["weight"] + problem.scale * tensors["B"] @ tensors["A"]
        options = {"gain": magnitudes.requires_grad_() / sums.norm(dim=1)}
    by_name = tensors | {"magnitudes": magnitudes}
    inputs = [by_name[name].requires_grad_() for name in ("x", *trained[work])]
    y = lora_linear_ref(**tensors, scale=problem.scale if work in ADAPTED else 0.0, **options)
    grads = torch.autograd.grad(y, inputs, problem.dy.to(compute))
    return dict(zip(("y", "x", *trained[work]), (y.detach(), *grads), strict=True))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, Frobenius; NaN if either has one."""
    return ((got.detach().to(expected.dtype) - expected).norm() / expected.norm()).item()


def check_results(results: tuple[Tensor, ...], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors by name, of y alone or of y and every gradient. Raises WrongResultError above the dtype's bound.

    W' = W + sBA needs no looser bound in bf16: rounding W' adds 2^-9 of an entry, about what rounding y does. What it
    loses, updates far smaller than W, is invisible beside W in any such norm.
    """
    names = list(expected)[: len(results)]
    errors = {name: relative_error(got, expected[name]) for name, got in zip(names, results, strict=True)}
    # NaN is not <= anything.
    wrong = [f"{_called(name)} {error:.1e}" for name, error in errors.items() if not error <= BOUNDS[dtype]]
    if wrong:
        raise WrongResultError(
            f"wrong result, no speed reported: relative error {', '.join(wrong)}; {dtype} allows {BOUNDS[dtype]:.0e}"
        )
    return errors


def _called(name: str) -> str:
    return name if name.startswith("y") else f"{name}'s gradient"


def check_variant(variant: Variant, problem: Problem, expected: dict[str, Tensor]) -> dict[str, float]:
    """Runs forward and backward once and checks all of it; see check_results."""
    return check_results(run(variant, problem, backward=True), expected, problem.x.dtype)
