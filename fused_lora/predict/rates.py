"""How fast the kernels of an architecture are, in few numbers: `python -m bench.predictions` fits and prints them.

Microseconds, or shares. Hopper's are fitted to six of the benchmark's shapes on an H200, those of compute capability 8
to half of what an H200 was measured at that plays an A100. A card brings its own rates of products and of memory.
"""

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Products:
    """launch: of one kernel. pace: a step's time over that at the card's peak. tile_end: from a tile's last step to the
    next one's first. sag: by which share products get slower while the card heats up to its power limit; settle: after
    how long most of that has come. skinny: the share of the peak that products over or to few ranks reach. stream: the
    share of the datasheet's bandwidth that they reach."""

    launch: float
    pace: float
    tile_end: float
    sag: float
    settle: float
    skinny: float
    stream: float


@dataclass(frozen=True)
class Csrc:
    """launch, pace and sag as in Products, whose other numbers hold here too. shrink, gradient: a step of such an item
    but for its products."""

    launch: float
    pace: float
    sag: float
    shrink: float
    gradient: float


@dataclass(frozen=True)
class Triton:
    """launch, pace, skinny and stream as in Products, whose other numbers hold here too."""

    launch: float
    pace: float
    skinny: float
    stream: float


@dataclass(frozen=True)
class Rates:
    """Of the three kinds of kernels on one architecture."""

    cublas: Products
    csrc: Csrc
    triton: Triton

    @property
    def triton_products(self) -> Products:
        return replace(self.cublas, **asdict(self.triton))


HOPPER = Rates(
    Products(launch=1.732, pace=1.0, tile_end=1.765, sag=0.2474, settle=1343, skinny=0.5, stream=0.5814),
    Csrc(launch=6.275, pace=1.0, sag=0.1901, shrink=0.2582, gradient=0.5416),
    Triton(launch=6.074, pace=0.9896, skinny=0.5977, stream=0.936),
)
# launch, skinny and stream of cuBLAS's, and stream of Triton's, are assumed: nobody has measured them.
AMPERE = Rates(
    Products(launch=3.0, pace=1.0, tile_end=2.014, sag=0.0, settle=1500, skinny=0.5, stream=0.85),
    Csrc(launch=6.481, pace=1.028, sag=0.0, shrink=0.2459, gradient=0.6639),
    Triton(launch=4.0, pace=1.121, skinny=0.7697, stream=0.85),
)


def rates_of(capability: int) -> Rates:
    """Of a compute capability, as 80 for 8.0."""
    return HOPPER if capability >= 90 else AMPERE
