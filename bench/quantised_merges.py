"""What becomes of updates merged into weights of 8 and 4 bits: `python -m bench.quantised_merges`, about a minute of a
CPU. Prints the tables of docs/quantised.md.

W is of normal numbers, quantised to begin with. An update is of rank 16, of a size in Frobenius norms relative to W.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from fused_lora.formats import FP8, INT8, NF4, Format, Stored, dequantise
from fused_lora.formats.lost import lost_factors
from fused_lora.formats.merging import merge_

from .document import table

FORMATS = [FP8(), FP8("rows", powers=True), FP8("blocks"), FP8("tensor"), INT8(), NF4(), NF4(nested=True)]
RANK, MERGES, MERGED = 16, 20, 0.01
NEAREST, STOCHASTIC, RESIDUAL = "nearest", "stochastic", "residual"
CASES = [(size, way) for size in (0.001, 0.01, 0.03) for way in (NEAREST, STOCHASTIC, RESIDUAL)]
CARRIED = (RANK, 4 * RANK)


def name_of(form: Format) -> str:
    return form.name + (", powers of two" if getattr(form, "powers", False) else "")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(width: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of a product of a size, W's being that of normal numbers."""
    A, B = numbers(RANK, width, seed=2 * seed), numbers(width, RANK, seed=2 * seed + 1)
    return A, B * (size * width / (B @ A).norm())


def options(way: str, seed: int, residual: Tensor) -> dict:
    """merge_'s."""
    if way == STOCHASTIC:
        return dict(rounding=STOCHASTIC, seed=int(torch.randint(2**62, (), generator=torch.manual_seed(seed))))
    return dict(residual=residual) if way == RESIDUAL else {}


def copied(stored: Stored) -> Stored:
    codes, scale, outer = (None if tensor is None else tensor.clone() for tensor in stored.tensors)
    return stored._replace(codes=codes, scale=scale, outer=outer)


def one_merge(form: Format, first: Stored) -> list[str]:
    """A cell for each size and way: the share that arrives, and the error."""
    cells = []
    for size, way in CASES:
        residual = torch.zeros(first.shape, dtype=torch.bfloat16)
        arrived = merge_(copied(first), form, *update(first.K, size, seed=1), 1.0, **options(way, 1, residual))
        cells.append(f"{arrived.share:.1%}, {arrived.error:.2g}")
    return cells


def drift(form: Format, first: Stored, way: str, carried: int = 0) -> tuple[float, float]:
    """After MERGES merges what is missing of all updates, by their size, in all that is kept and in the codes alone.

    carried: of which rank what a merge lost is carried on; it is merged beside the next update.
    """
    kept, residual = copied(first), torch.zeros(first.shape, dtype=torch.bfloat16)
    rest_A, rest_B = torch.zeros(0, first.K), torch.zeros(first.N, 0)
    wanted = torch.zeros(first.shape, dtype=torch.float64)
    for step in range(MERGES):
        A, B = update(first.K, MERGED, seed=10 + step)
        wanted += B.double() @ A.double()
        A, B, before = torch.cat([A, rest_A]), torch.cat([B, rest_B], 1), copied(kept)
        merge_(kept, form, A, B, 1.0, **options(way, step, residual))
        if carried:
            rest_A, rest_B = lost_factors(before, kept, form, A, B, 1.0, carried)
    missing = dequantise(first).double() + wanted - dequantise(kept).double()
    beside = residual.double() + rest_B.double() @ rest_A.double()
    return ((missing - beside).norm() / wanted.norm()).item(), (missing.norm() / wanted.norm()).item()


def drifts(form: Format, first: Stored) -> list[str]:
    cells = [f"{drift(form, first, way)[0]:.2g}" for way in (NEAREST, STOCHASTIC)]
    cells += ["{:.2g}, {:.2g}".format(*drift(form, first, RESIDUAL))]
    carried = [drift(form, first, NEAREST, rank)[0] for rank in CARRIED]
    return [*cells, *(f"{each:.2g}" for each in carried)]


def after_one(form: Format, first: Stored) -> list[str]:
    """What is missing of W after one merge to the nearest, and with what was lost beside it as factors."""
    kept, (A, B) = copied(first), update(first.K, MERGED, seed=1)
    arrived = merge_(kept, form, A, B, 1.0)
    new_A, new_B = lost_factors(first, kept, form, A, B, 1.0)
    whole = dequantise(first)
    missing = whole + B @ A - dequantise(kept) - new_B @ new_A
    return [f"{arrived.error * arrived.size:.2%}", f"{(missing.norm() / whole.norm()).item():.2%}"]


def empty(form: Format, first: Stored) -> list[str]:
    """Whether quantising again what was dequantised is the same, once and in ten rounds."""
    again, whole = form.quantise(dequantise(first)), dequantise(first)
    same_codes = torch.equal(again.codes.view(torch.uint8), first.codes.view(torch.uint8))
    same_scales = torch.equal(again.scale, first.scale)
    for _ in range(9):
        again = form.quantise(dequantise(again))
    moved = ((dequantise(again) - whole).norm() / whole.norm()).item()
    return ["yes" if same_codes else "no", "yes" if same_scales else "no", f"{moved:.1g}"]


def rows(width: int, cells: Callable[[Format, Stored], list[str]]) -> list[list[str]]:
    weight = numbers(width, width, seed=0)
    return [[name_of(form), *cells(form, form.quantise(weight))] for form in FORMATS]


def document(width: int) -> str:
    """All tables, in Markdown."""
    lines = [f"W is {width} x {width}. Share of one update that arrives, and its error:", ""]
    lines += table(["format", *(f"{size:.1%}, {way}" for size, way in CASES)], rows(width, one_merge))
    lines += ["", f"Drift after {MERGES} merges of {MERGED:.0%}, over the size of all updates together:", ""]
    header = ["format", NEAREST, STOCHASTIC, "residual, and its codes alone"]
    header += [f"lost factors of rank {rank} carried" for rank in CARRIED]
    lines += table(header, rows(width, drifts))
    lines += ["", f"Missing of W after one merge of {MERGED:.0%} to the nearest, and with its lost factors beside:", ""]
    lines += table(["format", "alone", f"with factors of rank {RANK}"], rows(width, after_one))
    lines += ["", "Quantised again what was dequantised:", ""]
    lines += table(["format", "same codes", "same scales", "change of W in ten rounds"], rows(width, empty))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of W, N and K")
    print(document(parser.parse_args().width))
