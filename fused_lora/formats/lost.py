"""What rounding lost of a merge, as the beginning of the next factors."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .merging import Weight, updates
from .stored import Format, Stored

EXTRA = 8  # directions beside the r that are looked for: of all that are found, the last are the least sure
ROUNDS = 6
TINY = 1e-30


@torch.no_grad()
def lost_factors(
    before: Stored,
    after: Stored,
    form: Format,
    A: Tensor,
    B: Tensor,
    scale: float,
    r: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A' (r, K), B' (N, r) in float32, by default of A's rank, with scale B' A' close to the best rank-r part of L:

        L = before + scale B A - after        before: a copy of what `after` was before the merge

    L is made some rows at a time, ROUNDS + 1 times, and never stands whole. Kept are (N + 3 K) (r + 8) floats; and the
    caller's copy of the codes, which is a quarter or an eighth of L.

    The largest part comes first. The rows of A' are as long as those of a new A, so that it is trained like one, and B'
    has the sizes. Where nothing was lost B' is 0.

    W + scale B' A' is then nearer to the sum than W is, but what is not of rank r is lost all the same, and the next
    merge is larger and rounds more: from merge to merge this has drifted further than no carrying (docs/quantised.md).

    Raises ValueError for a scale of 0 and for an r above K.
    """
    r, K = r or A.shape[0], A.shape[1]
    if scale == 0:
        raise ValueError("scale must not be 0: nothing comes of such factors")
    if r > K:
        raise ValueError(f"r must be at most in_features, {K}, got {r}")
    old, new, update = Weight(form, before), Weight(form, after), updates(A, B, scale)

    def lost() -> Iterator[Tensor]:
        return (old.rows(*rows) + update(*rows) - new.rows(*rows) for rows in after.chunks())

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(K, min(r + EXTRA, K), generator=generator).to(after.device)
    directions = leading_directions(lost, start)
    images = torch.cat([some @ directions for some in lost()])
    # Inside of what was found, the directions in order of what they hold.
    order = torch.linalg.eigh(images.double().T @ images.double()).eigenvectors.flip(1)[:, :r].float()
    length = 3**-0.5  # of a row of K entries that are uniform in (-1, 1) / sqrt(K)
    return (directions @ order).T * length, images @ order / (scale * length)


def leading_directions(parts: Callable[[], Iterator[Tensor]], start: Tensor) -> Tensor:
    """Orthonormal columns that nearly hold the largest singular directions of a matrix, which parts() gives row by row.

    Subspace iteration: Halko et al. 2011, arXiv:0909.4061. Of a matrix of zeros they are start's own.
    """
    found = torch.linalg.qr(start).Q
    for _ in range(ROUNDS):
        following = TINY * found
        for some in parts():
            following += some.T @ (some @ found)
        found = torch.linalg.qr(following).Q
    return found
