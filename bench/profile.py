"""`make profile`: two steps of this package for ncu to look into; the first finds everything cold."""

import argparse

import torch

from fused_lora import backends

from .shapes import GPU_SHAPES, Shape
from .variants import PACKAGE, VARIANTS, make_problem, run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", default=None, metavar="M K N r")
    sizes = parser.parse_args(arguments).sizes
    if sizes and len(sizes) != 4:
        parser.error("a shape is M K N r")
    if not torch.cuda.is_available():
        parser.exit(1, "no kernels run here: there is no GPU\n")
    choice = backends.choose(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    if choice.name == "reference":
        parser.exit(1, f"no kernels run here: {choice.reason}\n")
    problem = make_problem(Shape(*sizes) if sizes else GPU_SHAPES[0], "cuda", torch.bfloat16)
    variant = VARIANTS[PACKAGE].factory(problem)
    for _ in range(2):
        run(variant, problem, backward=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
