"""What a run did to the weights: singular values of W_T - W_0, projection by projection, as numbers and a picture.

    python -m fused_lora.pretrain.spectra pretrain_output/relora pretrain_output/full

W_0 is a run's begin/ (the end of its warm start), W_T its newest checkpoint with its update merged. An update of rank r
has r singular values; restarts add up to more (figure 5 of Lialin et al. 2023, arXiv:2307.05695).
Writes singular_values.csv (every one), ranks.csv (a line for each matrix) and spectra.png.
"""

import argparse
import csv
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..extras import needs
from ..relora.spectrum import change_spectrum, numerical_rank

with needs("pretrain"):
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from .merged import merged_weights, newest
    from .run import BEGIN, CHECKPOINTS

PROJECTION = re.compile(r".*\.(self_attn|mlp)\.(?P<projection>\w+)\.weight")


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix's change, largest first."""

    values: Tensor
    longer_side: int  # of the matrix

    @property
    def rank(self) -> int:
        return numerical_rank(self.values, self.longer_side)


def projections(place: Path) -> dict[str, Tensor]:
    """The projections' weights of a checkpoint in float32, with their low halves and their factors' updates."""
    weights, _ = merged_weights(place)
    return {name: weights[name].float() for name in filter(PROJECTION.fullmatch, weights)}


def spectra(begin: Path, end: Path) -> dict[str, Spectrum]:
    """Of each projection's change between two checkpoints of a model.

    Raises ValueError for checkpoints of different models.
    """
    before, after = projections(begin), projections(end)
    if {name: w.shape for name, w in before.items()} != {name: w.shape for name, w in after.items()}:
        raise ValueError(f"{begin} and {end} are of different models")
    return {
        name: Spectrum(change_spectrum(before[name], after[name]), max(after[name].shape))
        for name in tqdm(after, "singular values")
    }


def write(runs: dict[str, dict[str, Spectrum]], output: Path) -> None:
    """Both tables of every run's spectra."""
    with (
        open(output / "singular_values.csv", "w", newline="") as all_values,
        open(output / "ranks.csv", "w", newline="") as ranks,
    ):
        every, summary = csv.writer(all_values), csv.writer(ranks)
        every.writerow(("run", "matrix", "index", "singular_value"))
        summary.writerow(("run", "matrix", "size", "numerical_rank", "above_1_percent", "largest"))
        for run, found in runs.items():
            for name, spectrum in found.items():
                values = spectrum.values
                every.writerows((run, name, i, f"{value:.6g}") for i, value in enumerate(values.tolist()))
                above = int((values > 0.01 * values[0]).sum())
                summary.writerow((run, name, len(values), spectrum.rank, above, f"{values[0].item():.6g}"))


def by_projection(found: dict[str, Spectrum]) -> dict[str, list[Spectrum]]:
    """The layers' spectra of each kind of projection."""
    kinds: dict[str, list[Spectrum]] = {}
    for name, spectrum in found.items():
        kinds.setdefault(PROJECTION.fullmatch(name)["projection"], []).append(spectrum)
    return kinds


def plot(runs: dict[str, dict[str, Spectrum]], place: Path) -> None:
    """A panel for each kind of projection: the layers' mean singular value by its index, in units of the largest."""
    kinds = list(by_projection(next(iter(runs.values()))))
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, (len(kinds) + 1) // 2, sharey=True)
    for run, found in runs.items():
        for axis, layers in zip(axes.flat, by_projection(found).values(), strict=False):
            mean = torch.stack([layer.values for layer in layers]).mean(0)
            axis.semilogy((mean / mean[0]).clamp(min=1e-6), label=run, linewidth=1.2)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        axis.set(title=kind, ylim=(1e-4, 1.2), xlabel="index")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    axes.flat[0].legend()
    figure.suptitle("singular values of the change, largest = 1")
    figure.savefig(place, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("pretrain_output/spectra"))
    args = parser.parse_args(arguments)
    try:
        names = [run.resolve().name for run in args.runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in args.runs]
        found = (spectra(newest(run / BEGIN), newest(run / CHECKPOINTS)) for run in args.runs)
        runs = dict(zip(names, found, strict=True))
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(runs, args.output)
    plot(runs, args.output / "spectra.png")
    for run, found in runs.items():
        ranks = {
            kind: statistics.fmean(layer.rank for layer in layers) for kind, layers in by_projection(found).items()
        }
        print(f"{run}: mean numerical rank " + ", ".join(f"{kind} {rank:.0f}" for kind, rank in ranks.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
