"""The restart of weights in a format, in plain torch: of each layer all is done, or nothing."""

import torch
from torch import Tensor

from .. import reference
from ..formats import Arrived, Format
from ..formats.merging import Prepared, prepared
from ..ops import Part
from .seeds import mix


def prepare(
    parts: dict[str, Part], forms: dict[str, Format], seeds: dict[str, int], lows: dict[str, Tensor], rounding: str
) -> dict[str, Prepared]:
    """The merges of those whose weight is in a format, of which nothing is written yet. ValueError for what is not
    finite, with the layer's name."""
    found = {}
    for name, form in forms.items():
        weight, A, B, _, scale, *_ = parts[name]
        # Of another seed than A, which would else have rows in common with it.
        random = mix(seeds[name], 1) if rounding == "stochastic" else None
        try:
            found[name] = prepared(weight, form, A, B, scale, rounding, random, lows.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def restart(merges: dict[str, Prepared], parts: dict[str, Part], seeds: dict[str, int]) -> dict[str, Arrived]:
    """Merges, and begins the factors anew.

    Where it breaks off, the error says which layers have restarted. The others are as they were: called again with what
    is there then it ends in the same bits, since nothing is added to a weight whose B is zero.
    """
    arrived = {}
    try:
        for name, merge in merges.items():
            arrived[name] = _restart(merge, parts[name], seeds[name])
    except Exception as error:
        which = f"only {', '.join(arrived)}" if arrived else "none"
        raise RuntimeError(f"of {len(merges)} layers in a format {which} restarted: {error}") from error
    return arrived


def _restart(merge: Prepared, part: Part, seed: int) -> Arrived:
    # All memory is taken before the merge: what is in W must be gone from B.
    beginning = reference.new_A(*part.A.shape, torch.tensor(seed, device=part.A.device)).to(part.A.dtype)
    arrived = merge.write_()
    part.B.zero_()
    part.A.copy_(beginning)
    return arrived
