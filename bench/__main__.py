"""`python -m bench`: measure every variant on this machine, print the tables, write bench/results/<device>/."""

import argparse
import json
import sys
import time
from pathlib import Path

from .measure import Measurements
from .record import RESULTS, is_sound, slug
from .report import collect, markdown, write
from .shapes import PASSES, Shape, shapes_for
from .timing import ROUNDS, modes
from .variants import PACKAGE

QUICK_ROUNDS = 8


class Progress:
    """One line on stderr, rewritten in a terminal: a bar, how far, how long, what is measured now."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def __call__(self, text: str) -> None:
        filled = 24 * self.done // max(self.total, 1)
        seconds = int(time.monotonic() - self.began)
        bar = "#" * filled + "." * (24 - filled)
        line = f"[{bar}] {self.done}/{self.total} {seconds // 60}:{seconds % 60:02d} {text}"
        print(f"\r{line:<90}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if text == "done" or not sys.stderr.isatty():
            print(file=sys.stderr)
        self.done += 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"two shapes and {QUICK_ROUNDS} rounds instead of {ROUNDS}"
    )
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="M,K,N,r", help="these shapes instead")
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>, -quick if quick)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and plot of a results.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a variant's result was wrong or this package has no time."""
    options = parse(arguments)
    if options.redraw:
        results = json.loads(options.redraw.read_text())
        folder = options.out or options.redraw.parent
    else:
        measurements = Measurements(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
        shapes = tuple(options.shapes or shapes_for(measurements.device.type, options.quick))
        progress = Progress(len(shapes) * len(PASSES) * len(modes(measurements.device.type)))
        folder = options.out or RESULTS / (slug(measurements.device) + ("-quick" if options.quick else ""))
        # After every shape, so that a benchmark that is stopped keeps what it has measured.
        results = collect(measurements, shapes, progress, lambda results: write(results, folder))
        progress("done")
    print(markdown(results))
    print("\n".join(f"wrote {path}" for path in write(results, folder)))
    return 0 if is_sound(results["shapes"], PACKAGE) else 1


if __name__ == "__main__":
    sys.exit(main())
