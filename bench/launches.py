"""`python -m bench.launches`: each launch by itself, from a cold L2, of the frozen linear and of csrc's.

Writes bench/results/<device>/launches.json: us by shape and "<kernels> <pass>". Passes: f; dx of the frozen linear and
b of the other; fb, both together. With --as sm80 a Hopper card plays an older one. GPU only. `python -m
bench.predictions --launches` reads the files.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from . import played, timing
from .check import WrongResultError
from .document import as_json, write_files
from .measure import dtype_on, prepare
from .record import RESULTS, environment, slug
from .shapes import GPU_SHAPES, OTHER_SHAPES, Shape
from .variants import FLOOR, PACKAGE, VARIANTS, Kind, run

NAME = "launches.json"
NAMES = {FLOOR: ("cublas", "dx"), PACKAGE: ("csrc", "b")}  # of the kernels and of their backward pass


def time_launches(shape: Shape, kinds: dict[str, Kind], device: torch.device) -> dict[str, float]:
    """us of each launch at a shape. Raises where a result is wrong."""
    prepared = prepare(shape, device, dtype_on(device), {name: kinds[name] for name in NAMES})
    if prepared.refused:
        raise WrongResultError(str(prepared.refused))
    problem, stream, graphs = prepared.problem, torch.cuda.Stream(), {}
    for name, (kernels, backward) in NAMES.items():
        variant = prepared.ready[name]
        leaves = (problem.x, *variant.parameters.values())
        with torch.cuda.stream(stream):
            y = variant.step(problem.x)

        def back(y=y, leaves=leaves):
            return torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)

        graphs[f"{kernels} {backward}"] = timing.capture(back, stream)
        for pass_name, is_both in (("f", False), ("fb", True)):
            call = lambda variant=variant, is_both=is_both: run(variant, problem, is_both)  # noqa: E731
            graphs[f"{kernels} {pass_name}"] = timing.capture(call, stream)
    times = timing.time_graphs(graphs, timing.ROUNDS)
    return {name: round(median(each) * 1e6, 2) for name, each in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--as", dest="card", choices=played.SHARED_BYTES, help="on a Hopper card: as such a card (bench/played.py)"
    )
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="+", metavar="M,K,N,r", default=(*GPU_SHAPES, *OTHER_SHAPES)
    )
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    options = parser.parse_args(arguments)
    obstacle = played.obstacle() if options.card or not torch.cuda.is_available() else None
    if obstacle:
        parser.error(f"a GPU is needed, with --as one of compute capability 9.0: {obstacle}")
    if options.card:
        played.play(options.card)
    kinds, device = played.variants(options.card) if options.card else VARIANTS, torch.device("cuda")
    found = {"environment": environment(device, dtype_on(device), timing.ROUNDS), "shapes": {}}
    for shape in tqdm(options.shapes, desc="shapes"):
        found["shapes"]["{M},{K},{N},{r}".format(**vars(shape))] = time_launches(shape, kinds, device)
    for path in write_files(options.out or RESULTS / slug(device), {NAME: as_json(found)}, {}):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
