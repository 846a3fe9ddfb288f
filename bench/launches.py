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
from .document import as_json, write_files
from .measure import dtype_on
from .record import RESULTS, environment, slug
from .shapes import GPU_SHAPES, Shape
from .variants import FLOOR, PACKAGE, VARIANTS, Kind, make_problem

OTHERS = tuple(Shape(*each) for each in (
    (6144, 3072, 3072, 8), (6144, 3072, 8192, 32), (10240, 5120, 5120, 64), (3000, 4096, 11008, 48),
    (12288, 1536, 8960, 24), (8192, 6144, 2048, 256), (4096, 2560, 9728, 12),
))  # fmt: skip
NAME = "launches.json"
NAMES = {FLOOR: ("cublas", "dx"), PACKAGE: ("csrc", "b")}  # of the kernels and of their backward pass


def captured(call, stream: torch.cuda.Stream):
    """call() as a graph, captured on the stream that the forward pass of its backward ran on."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(timing.WARM_UP_ROUNDS):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph, results


def time_launches(shape: Shape, kinds: dict[str, Kind], device: torch.device) -> dict[str, float]:
    """us of each launch at a shape."""
    problem, stream = make_problem(shape, device, dtype_on(device)), torch.cuda.Stream()
    graphs = {}
    for name, (kernels, backward) in NAMES.items():
        variant = kinds[name].factory(problem)
        leaves = (problem.x, *variant.parameters.values())
        with torch.cuda.stream(stream):
            kept = variant.step(problem.x)

        def forward(variant=variant):
            return variant.step(problem.x)

        def back(y, leaves=leaves, keep=False):
            return torch.autograd.grad(y, leaves, problem.dy, retain_graph=keep)

        graphs[f"{kernels} f"] = captured(forward, stream)
        graphs[f"{kernels} {backward}"] = captured(lambda y=kept, back=back: back(y, keep=True), stream)
        graphs[f"{kernels} fb"] = captured(lambda forward=forward, back=back: back(forward()), stream)
    times = timing.time_graphs(graphs, timing.ROUNDS)
    return {name: round(median(each) * 1e6, 2) for name, each in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--as", dest="card", choices=played.SHARED_BYTES, help="on a Hopper card: as such a card (bench/played.py)"
    )
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="M,K,N,r", default=(*GPU_SHAPES, *OTHERS))
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
    print(
        "\n".join(
            f"wrote {path}" for path in write_files(options.out or RESULTS / slug(device), {NAME: as_json(found)}, {})
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
