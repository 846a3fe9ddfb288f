"""The fit of fused_lora.predict's numbers to measurements: least squares in logarithms, with numpy."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fused_lora.cards import Card
from fused_lora.predict import Prediction, predict
from fused_lora.predict.products import total
from fused_lora.predict.rates import Rates

from .shapes import Shape

RATIO_WEIGHT = 3.0  # of a ratio's error beside a launch's


@dataclass(frozen=True)
class Measured:
    """By the kernels' name, "frozen" among them: times in us of (forward, backward), and ratios to the frozen linear's
    of (forward, both); NaN where it is not known. fitted: whether the fit may see it."""

    shape: Shape
    times: dict[str, np.ndarray]
    ratios: dict[str, np.ndarray]
    fitted: bool


def errors(measured: Measured, kernels: str, card: Card, rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """(passes: predicted over measured, minus one; ratios: predicted minus measured)."""
    found = prediction(measured.shape, kernels, card, rates)
    predicted = np.array([total(found.forward), total(found.backward)])
    ratios = np.array([found.forward_ratio, found.ratio])
    return predicted / measured.times[kernels] - 1, ratios - measured.ratios[kernels]


def prediction(shape: Shape, kernels: str, card: Card, rates: Rates) -> Prediction:
    return predict(shape.M, shape.K, shape.N, shape.r, card, kernels, rates)


def residuals(data: list[Measured], kernels: tuple[str, ...], card: Card, rates: Rates) -> np.ndarray:
    parts = []
    for measured in data:
        for name in kernels:
            launches, ratios = errors(measured, name, card, rates)
            parts += [np.log1p(launches), RATIO_WEIGHT * ratios]
    found = np.concatenate(parts)
    return found[~np.isnan(found)]


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


def fit(data: list[Measured], kernels, free, believed: dict[str, tuple[float, float]], card: Card, rates: Rates):
    """(card, rates) with the values of `free` that explain the data best."""
    start = np.log([believed[name][0] for name in free])
    weights = np.array([believed[name][1] for name in free])

    def function(x):
        values = dict(zip(free, np.exp(x).tolist(), strict=True))
        return np.concatenate([residuals(data, kernels, *with_values(card, rates, values)), weights * (x - start)])

    best = np.exp(least_squares(function, start))
    return with_values(card, rates, {name: float(f"{value:.4g}") for name, value in zip(free, best, strict=True)})
