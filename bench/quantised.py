"""A LoRA linear over bases in 8 and 4 bits, beside 16 bits and the frozen linear: `python -m bench.quantised`.

Forward and backward with the gradients of x, A and B, kernel time on a GPU, all bases interleaved. Each is checked
against float64 on the values that its codes stand for before one is timed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora import formats, lora_linear
from fused_lora.reference import lora_linear_ref

from . import timing
from .check import BOUNDS, WrongResultError, relative_error
from .document import as_json, described, table, write_files
from .measure import dtype_on
from .record import RESULTS, environment, slug, summary

FROZEN, PLAIN = "frozen linear", "16 bits"
BASES = {"fp8": formats.FP8(), "int8": formats.INT8(), "nf4": formats.NF4(), "nf4, nested": formats.NF4(nested=True)}
SCALE = 2.0


class Shape(NamedTuple):
    M: int
    K: int
    N: int
    r: int


GPU_SHAPES = (
    Shape(8192, 4096, 4096, 16), Shape(16384, 2048, 2048, 128), Shape(8192, 4096, 14336, 64),
    Shape(8192, 8192, 8192, 16), Shape(2048, 4096, 4096, 16),
)  # fmt: skip
CPU_SHAPES = (Shape(64, 96, 128, 4),)


class Problem:
    """A linear and its update with all their gradients; `weight` is None for the linear alone."""

    def __init__(self, shape: Shape, device: torch.device):
        M, K, N, r = shape
        make = lambda *sizes: (torch.randn(sizes, device=device) * sizes[1] ** -0.5).to(dtype_on(device))  # noqa: E731
        self.x, self.weight, self.A, self.B, self.dy = make(M, K), make(N, K), make(r, K), make(N, r), make(M, N)
        self.scale = torch.tensor(SCALE, device=device)
        for tensor in (self.x, self.A, self.B):
            tensor.requires_grad_()

    def frozen(self) -> tuple[Tensor, ...]:
        y = F.linear(self.x, self.weight)
        return y, *torch.autograd.grad(y, [self.x], self.dy)

    def step(self, weight) -> tuple[Tensor, ...]:
        y = lora_linear(self.x, weight, self.A, self.B, scale=self.scale)
        return y, *torch.autograd.grad(y, [self.x, self.A, self.B], self.dy)

    def check(self, base: str, weight) -> None:
        """Raises WrongResultError."""
        values = weight if isinstance(weight, Tensor) else formats.dequantise(weight, self.x.dtype)
        x, A, B = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.A, self.B))
        y = lora_linear_ref(x, values.double(), A, B, scale=self.scale.double())
        exact = (y, *torch.autograd.grad(y, [x, A, B], self.dy.double()))
        for got, expected in zip(self.step(weight), exact, strict=True):
            error = relative_error(got, expected.detach())
            if not error <= BOUNDS[self.x.dtype]:
                raise WrongResultError(f"{base}: wrong result, no speed reported: relative error {error:.1e}")


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, dict]:
    """Seconds by base."""
    torch.manual_seed(0)
    problem = Problem(shape, device)
    weights = {PLAIN: problem.weight} | {base: form.quantise(problem.weight) for base, form in BASES.items()}
    steps: dict[str, Callable] = {FROZEN: problem.frozen}
    for base, weight in weights.items():
        problem.check(base, weight)
        steps[base] = lambda weight=weight: problem.step(weight)
    if device.type == "cuda":
        samples = timing.time_graphs({base: timing.capture(step) for base, step in steps.items()}, rounds)
    else:
        samples = timing.time_eager(steps, rounds, "cpu")
    return {base: summary(seconds) for base, seconds in samples.items()}


def _row(case: dict) -> list[str]:
    times = {base: seconds["median"] for base, seconds in case["seconds"].items()}
    shape = ", ".join(f"{size:,}" for size in case["shape"])
    over_plain = (f"{times[base] / times[PLAIN]:.3f}" for base in BASES)
    return [shape, f"{times[FROZEN] * 1e6:,.0f} us", f"{times[PLAIN] / times[FROZEN]:.3f}", *over_plain]


def markdown(results: dict) -> str:
    header = ["M, K, N, r", FROZEN, f"{PLAIN} over it", *(f"{base} over {PLAIN}" for base in BASES)]
    words = f"Forward and backward; median of {results['rounds']} rounds, cold L2, by `python -m bench.quantised`."
    lines = table(header, [_row(case) for case in results["cases"]])
    return "\n".join([f"{described(results)} {words}", "", *lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS)
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = environment(device, dtype_on(device), options.rounds) | {"cases": []}
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        results["cases"].append({"shape": list(shape), "seconds": measure(shape, options.rounds, device)})
    print(markdown(results))
    folder = options.out or RESULTS / slug(device)
    write_files(folder, {"quantised.md": markdown(results), "quantised.json": as_json(results)}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
