"""Fits the numbers of fused_lora.predict to measurements, and checks them on shapes kept out: `python -m bench.predictions`.

Reads results.json of an H200 and of an H200 that plays an A100 (until that is measured: what docs/sm80.md has of it),
fits half of the shapes, the extreme ones, by least squares in logarithms, and prints the others' errors. What it prints
as fitted are the numbers in fused_lora/cards.py and fused_lora/predict/rates.py.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fused_lora.cards import CARDS, Card
from fused_lora.predict import Prediction, predict
from fused_lora.predict.products import total
from fused_lora.predict.rates import AMPERE, HOPPER, Rates

from .record import RESULTS
from .shapes import FORWARD, FORWARD_BACKWARD, Shape

LAUNCH_BAR, RATIO_BAR = 0.15, 0.25
# Ratios move so much from run to run (docs/hopper.md says up to 0.04).
NOISE = 0.02
RATIO_WEIGHT = 3.0  # of a ratio's error beside a launch's
# The largest and the smallest, the deepest and the flattest, and the highest rank for its size: the rest lies between.
FITTED = {
    "8192x4096x4096-r128", "16384x2048x2048-r128", "32768x1024x1024-r128", "8192x8192x8192-r16", "512x4096x4096-r16",
    "16384x5120x5120-r32",
}  # fmt: skip
# An H200 whose products go by mma.sync, which gives 63% of its rate.
AS_SM80 = Card(80, 132, 166912, 620, 4800, 50, 141, 0.75)
# What is known beforehand, by clocks in the kernels and by products of other sizes, and how much it weighs.
BELIEVED = {
    "card.peak": (0.83, 0.02), "cublas.launch": (3.0, 0.05), "cublas.tile_end": (1.5, 0.1), "cublas.sag": (0.2, 0.05),
    "cublas.settle": (1500, 0.05), "cublas.skinny": (0.5, 0.02), "cublas.stream": (0.8, 0.05),
    "csrc.launch": (7.0, 0.1), "csrc.pace": (1.0, 0.05), "csrc.sag": (0.2, 0.05), "csrc.shrink": (0.3, 0.1),
    "csrc.gradient": (0.6, 0.1), "triton.launch": (4.0, 0.05), "triton.pace": (1.0, 0.02),
    "triton.skinny": (0.5, 0.02), "triton.stream": (0.8, 0.05),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """us of (forward, backward), by the kernels' name; "frozen" is among them. fitted: whether the fit may see it."""

    shape: Shape
    times: dict[str, tuple[float, float]]
    fitted: bool

    def ratios(self, kernels: str) -> tuple[float, float]:
        own, frozen = self.times[kernels], self.times["frozen"]
        return own[0] / frozen[0], sum(own) / sum(frozen)


def read_results(path: Path, names: dict[str, str]) -> list[Measured]:
    """Of a results.json: variants by the names that predictions have for them. Backward is the difference of medians."""
    found = []
    for entry in json.loads(path.read_text())["shapes"]:
        passes = [entry["times"]["graph"][name] for name in (FORWARD, FORWARD_BACKWARD)]
        times = {}
        for variant, kernels in names.items():
            forward, both = (each[variant]["median_us"] for each in passes)
            times[kernels] = forward, both - forward
        found.append(Measured(Shape(**entry["shape"]), times, entry["name"] in FITTED))
    return found


def errors(measured: Measured, kernels: str, card: Card, rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """(launches: predicted over measured, minus one; ratios: predicted minus measured), forward and backward of each."""
    found = prediction(measured.shape, kernels, card, rates)
    predicted = np.array([total(found.forward), total(found.backward)])
    ratios = np.array([found.forward_ratio, found.ratio])
    return predicted / measured.times[kernels] - 1, ratios - measured.ratios(kernels)


def prediction(shape: Shape, kernels: str, card: Card, rates: Rates) -> Prediction:
    return predict(shape.M, shape.K, shape.N, shape.r, card, kernels, rates)


def residuals(data: list[Measured], kernels: tuple[str, ...], card: Card, rates: Rates) -> np.ndarray:
    parts = []
    for measured in data:
        for name in kernels:
            launches, ratios = errors(measured, name, card, rates)
            parts += [np.log1p(launches), RATIO_WEIGHT * ratios]
    return np.concatenate(parts)


def with_values(card: Card, rates: Rates, values: dict[str, float]) -> tuple[Card, Rates]:
    for name, value in values.items():
        kind, _, number = name.rpartition(".")
        if kind == "card":
            card = replace(card, **{number: value})
        else:
            rates = replace(rates, **{kind: replace(getattr(rates, kind), **{number: value})})
    return card, rates


def least_squares(function: Callable[[np.ndarray], np.ndarray], start: np.ndarray, rounds: int = 40) -> np.ndarray:
    """Levenberg and Marquardt's, with numpy's least squares and differences for derivatives."""
    x, found, damping = start, function(start), 1e-2
    for _ in range(rounds):
        slopes = np.stack([(function(x + unit) - found) / 1e-3 for unit in 1e-3 * np.eye(len(x))], axis=1)
        rows = np.vstack([slopes, damping**0.5 * np.eye(len(x))])
        step = np.linalg.lstsq(rows, np.concatenate([-found, np.zeros(len(x))]), rcond=None)[0].clip(-0.3, 0.3)
        tried = function(x + step)
        if tried @ tried < found @ found:
            x, found, damping = x + step, tried, damping / 2
        else:
            damping *= 4
    return x


def fit(data: list[Measured], kernels: tuple[str, ...], free: tuple[str, ...], card: Card, rates: Rates):
    """(card, rates) with the values of `free` that explain the data best."""
    believed = np.log([BELIEVED[name][0] for name in free])
    weights = np.array([BELIEVED[name][1] for name in free])

    def function(x):
        values = dict(zip(free, np.exp(x).tolist(), strict=True))
        return np.concatenate([residuals(data, kernels, *with_values(card, rates, values)), weights * (x - believed)])

    best = np.exp(least_squares(function, believed))
    return with_values(card, rates, dict(zip(free, best.round(4).tolist(), strict=True)))


@dataclass(frozen=True)
class Data:
    """Measurements and what is fitted of them, step by step: (kernels, numbers)."""

    card: Card
    rates: Rates
    measured: list[Measured]
    steps: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def hopper() -> Data:
    names = {"frozen": "frozen", "fused_lora": "csrc", "fused_lora_triton": "triton", "addmm": "addmm"}
    steps = (
        (("frozen", "csrc"), (
            "card.peak", "cublas.launch", "cublas.tile_end", "cublas.sag", "cublas.settle",
            "csrc.launch", "csrc.sag", "csrc.shrink", "csrc.gradient",
        )),
        (("addmm",), ("cublas.skinny", "cublas.stream")),
        (("triton",), ("triton.launch", "triton.pace", "triton.skinny", "triton.stream")),
    )  # fmt: skip
    return Data(CARDS["H200"], HOPPER, read_results(RESULTS / "nvidia-h200" / "results.json", names), steps)


def fitted(data: Data) -> tuple[Card, Rates]:
    card, rates = data.card, data.rates
    seen = [each for each in data.measured if each.fitted]
    for kernels, free in data.steps:
        card, rates = fit(seen, kernels, free, card, rates)
    return card, rates


def report(measured: list[Measured], kernels: str, card: Card, rates: Rates) -> list[str]:
    lines = []
    for each in sorted(measured, key=lambda each: each.fitted):
        launches, ratios = errors(each, kernels, card, rates)
        shown = "  ".join(_ratio(truth, error) for truth, error in zip(each.ratios(kernels), ratios, strict=True))
        launch = " ".join(f"{error:+6.1%}" for error in launches)
        lines.append(f"{'fit ' if each.fitted else 'held'} {kernels:6} {each.shape!s:24} {launch}   {shown}")
    return lines


def _ratio(truth: float, error: float) -> str:
    verdict = "ok" if abs(error) <= RATIO_BAR * abs(truth - 1) else "noise" if abs(error) <= NOISE else "MISS"
    return f"{truth:.3f} {truth + error:.3f} {verdict:5}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    for title, data in (("H200", hopper()),):
        card, rates = fitted(data)
        print(f"{title}: peak={card.peak}, {rates}")
        for kernels in data.measured[0].times:
            print("\n".join(report(data.measured, kernels, card, rates)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
