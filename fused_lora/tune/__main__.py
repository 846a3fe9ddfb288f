"""Measures csrc's kernels (cuda), Triton's and torch's own products (addmm) on the GPU at hand, forward + backward of
each shape, and remembers which is the fastest: later calls of such shapes use it.

    python -m fused_lora.tune 8192,4096,4096,16 8192,4096,14336,16
    python -m fused_lora.tune Qwen/Qwen3-0.6B --tokens 4096 8192 --rank 32

Tokens count by powers of two; in_features, out_features, rank, dtype and whether there is dropout count exactly.
"""

import argparse
import sys

import torch

from .. import backends, checks, choices
from ..extras import needs
from .measure import CANDIDATES, Measured, measure
from .shapes import Shape, is_shape, parse

with needs("tune"):
    from tqdm import tqdm

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """With all shapes, each of them once, in `shapes`."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_lora.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shapes", nargs="+", metavar="shape", help="M,K,N,r, or a Hugging Face model by name, folder or config.json"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], metavar="M", help="for models (8192)")
    parser.add_argument("--rank", type=int, default=16, metavar="r", help="for models (16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all tensors (bfloat16)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="LoRA's dropout (none)")
    options = parser.parse_args(arguments)
    try:
        for tokens in options.tokens:
            checks.check_count("--tokens", tokens, 1)
        checks.check_rank(options.rank)
        checks.check_probability("--dropout", options.dropout)
        shapes = []
        for text in sorted(options.shapes, key=is_shape, reverse=True):
            if not is_shape(text):  # a model's name may be looked for in the network
                _check_device(parser)
            shapes += parse(text, options.tokens, options.rank)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    _check_device(parser)
    options.shapes = list(dict.fromkeys(shapes))
    return options


def _check_device(parser: argparse.ArgumentParser) -> None:
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")


def tune(shape: Shape, dtype: torch.dtype, p: float, device: torch.device) -> Measured:
    """Measures a shape, and remembers what was found if any backend ran it."""
    M, K, N, r = shape
    found = measure(shape, dtype, p, device)
    if choices.ranked(found.times):
        choices.remember(device, choices.key_of(M, N, K, r, dtype, p), found.times)
    torch.cuda.empty_cache()
    return found


def table(found: dict[Shape, Measured]) -> list[str]:
    """Lines: microseconds by backend, and which is chosen."""
    rows = [["M,K,N,r", *CANDIDATES, "fastest"]]
    for shape, measured in found.items():
        times = [measured.times.get(name) for name in CANDIDATES]
        fastest = next(iter(choices.ranked(measured.times)), ("none ran",))[0]
        rows.append([str(shape), *("-" if time is None else f"{time:.0f} us" for time in times), fastest])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def reasons(found: dict[Shape, Measured]) -> list[str]:
    """Lines: why a backend has no time, each reason once."""
    return list(dict.fromkeys(f"{name}: {why}" for each in found.values() for name, why in each.reasons.items()))


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where no backend ran a shape."""
    options = options_of(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{backends.describe(device)}; {options.dtype}, dropout {options.dropout}")
    dtype, p = DTYPES[options.dtype], options.dropout
    found = {shape: tune(shape, dtype, p, device) for shape in tqdm(options.shapes, desc="shapes")}
    print("\n".join([*table(found), *reasons(found)]))
    if choices.measured(device).writable:
        print(f"remembered in {backends.cache_file('backends', device)}; delete it to forget")
    return 0 if all(choices.ranked(measured.times) for measured in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
