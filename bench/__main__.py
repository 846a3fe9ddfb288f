"""`python -m bench`: measure every variant on this machine, print the tables, write bench/results/<device>/."""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from . import played
from .document import write_samples
from .measure import Measurements
from .record import RESULTS, is_sound, slug
from .report import collect, markdown, write
from .shapes import Shape, shapes_for
from .timing import GRAPH, ROUNDS
from .variants import PACKAGE

QUICK_ROUNDS = 8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"two shapes and {QUICK_ROUNDS} rounds instead of {ROUNDS}"
    )
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="M,K,N,r", help="these shapes instead")
    parser.add_argument(
        "--as", dest="card", choices=played.SHARED_BYTES, help="on a Hopper card: as such a card (bench/played.py)"
    )
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>, -quick if quick)")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="a file, not for git, for every sample too")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and plot of a results.json")
    options = parser.parse_args(arguments)
    obstacle = options.card and played.obstacle()
    if obstacle:
        parser.error(f"--as {options.card} needs a GPU of compute capability 9.0: {obstacle}")
    return options


def measurements_for(options: argparse.Namespace) -> Measurements:
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.card is None:
        return Measurements(rounds=rounds)
    played.play(options.card)
    return Measurements(rounds=rounds, variants=played.variants(options.card), modes=(GRAPH,))


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a variant's result was wrong or this package has no time."""
    options = parse(arguments)
    if options.redraw:
        results = json.loads(options.redraw.read_text())
        folder = options.out or options.redraw.parent
    else:
        measurements = measurements_for(options)
        shapes = tuple(options.shapes or shapes_for(measurements.device.type, options.quick))
        folder = options.out or RESULTS / (slug(measurements.device) + ("-quick" if options.quick else ""))
        with tqdm(total=len(shapes), desc="shapes") as bar:

            def keep(results: dict) -> None:
                """After every shape, so that a benchmark that is stopped keeps what it has measured."""
                write(results, folder)
                write_samples(results, options.samples)
                bar.update()

            results = collect(measurements, shapes, bar.set_postfix_str, keep)
    print(markdown(results))
    print("\n".join(f"wrote {path}" for path in write(results, folder)))
    return 0 if is_sound(results["shapes"], PACKAGE) else 1


if __name__ == "__main__":
    sys.exit(main())
