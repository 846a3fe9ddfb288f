"""Fits fused_lora.predict to measurements and checks it on shapes kept out: `python -m bench.predictions`.

Reads results.json of an H200 and of an H200 that plays an A100, fits half of the shapes, the extreme ones, by least
squares in logarithms, and prints the others' errors. What it prints as fitted are the numbers in fused_lora/cards.py
and fused_lora/predict/rates.py.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fused_lora.cards import CARDS, Card
from fused_lora.predict import predict
from fused_lora.predict.rates import AMPERE, HOPPER, Rates

from .document import table
from .fitting import Measured, errors, fit
from .record import RESULTS
from .shapes import FORWARD, FORWARD_BACKWARD, Shape

PASS_BAR, RATIO_BAR = 0.15, 0.25
# Ratios move so much from run to run (docs/hopper.md says up to 0.04).
NOISE = 0.02
# The largest and the smallest, the deepest and the flattest, and the highest rank for its size: the rest lies between.
FITTED = {
    "8192x4096x4096-r128", "16384x2048x2048-r128", "32768x1024x1024-r128", "8192x8192x8192-r16", "512x4096x4096-r16",
    "16384x5120x5120-r32",
}  # fmt: skip
# An H200 whose products go by mma.sync, which gives 63% of its rate.
AS_SM80 = Card(80, 132, 166912, 620, 4800, 50, 141, 0.7633)
# Where the fit begins and what leaving it costs: csrc's by clocks in its kernels (docs/hopper.md), the others guesses.
BELIEVED = {
    "card.peak": (0.83, 0.02), "cublas.launch": (3.0, 0.05), "cublas.tile_end": (1.5, 0.1), "cublas.sag": (0.2, 0.05),
    "cublas.settle": (1500, 0.05), "cublas.skinny": (0.5, 0.02), "cublas.stream": (0.8, 0.05),
    "csrc.launch": (7.0, 0.1), "csrc.sag": (0.2, 0.05), "csrc.shrink": (0.3, 0.1),
    "csrc.gradient": (0.6, 0.1), "triton.launch": (4.0, 0.05), "triton.pace": (1.0, 0.05),
    "triton.skinny": (0.5, 0.02), "triton.stream": (0.9, 1.0),
}  # fmt: skip
# Of csrc/sm80, by clocks in its kernels (docs/sm80.md).
BELIEVED_OF_SM80 = BELIEVED | {
    "card.peak": (0.75, 0.02), "csrc.launch": (8.0, 0.5), "csrc.pace": (1.06, 1.0), "csrc.shrink": (0.33, 0.3),
    "csrc.gradient": (0.5, 0.1), "triton.pace": (1.6, 0.02),
}  # fmt: skip


def read_results(path: Path, names: dict[str, str]) -> list[Measured]:
    """Of a results.json: variants by their names in predictions. Backward is the difference of medians."""
    found = []
    for entry in json.loads(path.read_text())["shapes"]:
        if entry["skipped"]:
            continue
        passes = [entry["times"]["graph"][name] for name in (FORWARD, FORWARD_BACKWARD)]
        both = {name: np.array([_us(each, variant) for each in passes]) for variant, name in names.items()}
        times = {name: np.array([forward, whole - forward]) for name, (forward, whole) in both.items()}
        ratios = {name: of_both / both["frozen"] for name, of_both in both.items()}
        found.append(Measured(Shape(**entry["shape"]), times, ratios, entry["name"] in FITTED))
    return found


def _us(outcomes: dict, variant: str) -> float:
    """NaN where it was not measured."""
    return outcomes.get(variant, {}).get("median_us", np.nan)


def read_ladder(path: Path) -> list[Measured]:
    """Of ratios to products, with the products' times where they are known."""
    found = []
    for entry in json.loads(path.read_text())["shapes"]:
        shape, times = Shape(**entry["shape"]), {"frozen": np.array(entry.get("cublas") or [np.nan] * 2)}
        ratios = {"frozen": np.ones(2)}
        for name in ("csrc", "triton", "addmm"):
            told = entry.get(name) or {}
            ratios[name] = np.array([told.get(each, np.nan) for each in (FORWARD, FORWARD_BACKWARD)])
            times[name] = np.array([told.get(each, np.nan) for each in (FORWARD, "backward")]) * times["frozen"]
        found.append(Measured(shape, times, ratios, str(shape) in FITTED))
    return found


def read_launches(path: Path) -> list[Measured]:
    """Of single launches, as launches.py writes them."""
    found = []
    for key, us in json.loads(path.read_text())["shapes"].items():
        shape = Shape.parse(key)
        times = {
            "frozen": np.array([us[f"cublas {name}"] for name in ("f", "dx")]),
            "csrc": np.array([us[f"csrc {name}"] for name in ("f", "b")]),
        }
        both = np.array([us[f"{name} fb"] for name in ("cublas", "csrc")])
        forward = times["csrc"][0] / times["frozen"][0]
        ratios = {"frozen": np.ones(2), "csrc": np.array([forward, both[1] / both[0]])}
        found.append(Measured(shape, times, ratios, str(shape) in FITTED))
    return found


@dataclass(frozen=True)
class Data:
    """Measurements of a card, and what is fitted of them, step by step: (kernels, numbers)."""

    title: str
    card: Card
    rates: Rates
    measured: list[Measured]
    steps: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    believed: dict[str, tuple[float, float]]


NAMES = {"frozen": "frozen", "fused_lora": "csrc", "fused_lora_triton": "triton", "addmm": "addmm"}
OF_CSRC = "csrc.launch", "csrc.shrink", "csrc.gradient"
OF_PRODUCTS = "card.peak", "cublas.launch", "cublas.tile_end"


def hopper() -> Data:
    steps = (
        (("frozen", "csrc"), (*OF_PRODUCTS, "cublas.sag", "cublas.settle", "csrc.sag", *OF_CSRC)),
        (("addmm",), ("cublas.skinny", "cublas.stream")),
        (("triton",), ("triton.launch", "triton.pace", "triton.skinny", "triton.stream")),
    )
    folder = RESULTS / "nvidia-h200"
    measured = read_results(folder / "results.json", NAMES) + read_ladder(folder / "other_shapes.json")
    return Data("H200", CARDS["H200"], HOPPER, measured, steps, BELIEVED)


def as_sm80() -> Data:
    steps = (
        (("frozen", "csrc"), ("card.peak", "cublas.tile_end", "csrc.pace", *OF_CSRC)),
        (("triton",), ("triton.pace", "triton.skinny")),
    )
    measured = read_results(RESULTS / "nvidia-h200-as-sm80" / "results.json", NAMES)
    return Data("H200 as sm80", AS_SM80, AMPERE, measured, steps, BELIEVED_OF_SM80)


def on_h100() -> Data:
    """Nothing is fitted: an H200's numbers with an H100's datasheet."""
    measured = read_results(RESULTS / "nvidia-h100-80gb-hbm3" / "results.json", NAMES)
    return Data("H100", CARDS["H100"], HOPPER, [replace(each, fitted=False) for each in measured], (), {})


def of_launches(data: Data, folder: str) -> Data:
    """Nothing is fitted: single launches by the package's numbers."""
    measured = [replace(each, fitted=False) for each in read_launches(RESULTS / folder / "launches.json")]
    return Data(f"{data.title}, each launch by itself", data.card, data.rates, measured, (), {})


def fitted(data: Data) -> tuple[Card, Rates]:
    """(card, rates) with all that data's steps find, each on what the ones before found."""
    card, rates = data.card, data.rates
    for kernels, free in data.steps:
        seen = [each for each in data.measured if each.fitted and set(kernels) <= set(each.times)]
        if seen:
            card, rates = fit(seen, kernels, free, data.believed, card, rates)
    return card, rates


def as_python(card: Card, rates: Rates) -> str:
    """The fitted numbers as the package has them."""
    return "\n".join([f"card.peak={card.peak}", *(f"{kind}={getattr(rates, kind)}" for kind in vars(rates))])


def verdict(truth: float, error: float) -> str:
    """ok: within the bar. noise: not, but nearer than two runs are to each other. unknown: not measured."""
    if np.isnan(error):
        return "unknown"
    if abs(error) <= RATIO_BAR * abs(truth - 1):
        return "ok"
    return "noise" if abs(error) <= NOISE else "MISS"


def rows(measured: list[Measured], kernels: str, card: Card, rates: Rates) -> list[list[str]]:
    """Of a table: those that were kept out first."""
    found = []
    for each in sorted(measured, key=lambda each: each.fitted):
        if np.isnan([*each.times[kernels], *each.ratios[kernels]]).all():
            continue
        passes, ratios = errors(each, kernels, card, rates)
        cells = ["fitted" if each.fitted else "kept out", kernels, str(each.shape)]
        cells += [f"{error:+.1%}" if abs(error) <= PASS_BAR else f"{error:+.1%} MISS" for error in passes]
        for truth, error in zip(each.ratios[kernels], ratios, strict=True):
            cells += [f"{truth:.3f}", f"{truth + error:.3f}", verdict(truth, error)]
        found.append([cell.replace("+nan% MISS", "-").replace("nan", "-") for cell in cells])
    return found


HEADER = ["", "kernels", "M x K x N - r", "f", "b", "f ratio", "predicted", "", "f+b ratio", "predicted", ""]


def report(data: Data) -> str:
    """Markdown: the fitted numbers, and a table of errors."""
    card, rates = fitted(data)
    lines = [f"### {data.title}", "", "```", as_python(card, rates), "```", ""]
    cells = [row for kernels in data.measured[0].times for row in rows(data.measured, kernels, card, rates)]
    return "\n".join([*lines, *table(HEADER, cells), "", summary(data, card, rates), ""])


def summary(data: Data, card: Card, rates: Rates) -> str:
    """A line for each kind of kernels: what of the shapes that were kept out is within the bars."""
    lines = []
    for kernels in data.measured[0].times:
        found = [(each, *errors(each, kernels, card, rates)) for each in data.measured if not each.fitted]
        passes = np.abs([passes for _, passes, _ in found])
        told = [verdict(each.ratios[kernels][1], ratios[1]) for each, _, ratios in found]
        counts = ", ".join(f"{told.count(word)} {word}" for word in dict.fromkeys(told))
        line = f"* {kernels}:"
        if not np.isnan(passes).all():
            line += f" passes within {np.nanmax(passes):.1%} ({'ok' if np.nanmax(passes) <= PASS_BAR else 'MISS'})"
        lines.append(line if kernels == "frozen" else f"{line}; f+b ratios: {counts}")
    return "\n".join(lines)


EXAMPLES = Shape(8192, 4096, 4096, 16), Shape(16384, 2048, 2048, 128), Shape(32768, 1024, 1024, 128)


def of_cards() -> str:
    """Markdown: forward + backward over the frozen linear's on every card, and its forward's us."""
    lines = []
    for name, card in CARDS.items():
        cells = [name]
        for shape in EXAMPLES:
            found = [
                predict(shape.M, shape.K, shape.N, shape.r, card, kernels) for kernels in ("csrc", "triton", "addmm")
            ]
            cells.append(f"{found[0].frozen[0].us:.0f} us; " + ", ".join(f"{each.ratio:.2f}" for each in found))
        lines.append(cells)
    header = ["csrc, Triton, addmm", *(f"{each.M}, {each.K}, {each.N}, {each.r}" for each in EXAMPLES)]
    return "\n".join(["### Predicted for every card", "", *table(header, lines), ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--launches", action="store_true", help="an H200's single launches by the package's numbers; nothing is fitted"
    )
    if parser.parse_args(arguments).launches:
        for data in (of_launches(hopper(), "nvidia-h200"), of_launches(as_sm80(), "nvidia-h200-as-sm80")):
            print(report(data))
        return 0
    for data in (hopper(), on_h100(), as_sm80()):
        print(report(data))
    print(of_cards())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
