"""Which tile a kernel uses: a small analytic table per architecture, and ONE rule for what is legal.

Tiles are chosen from shapes, dtype and GPU alone, so that a layer's results do not change from call to call. What
depends on the number of tokens is not remembered here: it is asked for once a plan.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from ..cards import CARDS


@dataclass(frozen=True)
class Gpu:
    """What tile choice depends on: shared_memory is the limit of one block in bytes, tile_cache the file of measured
    tiles, None without autotuning."""

    capability: int
    sm_count: int
    shared_memory: int
    tile_cache: str | None = None

    @property
    def has_tma(self) -> bool:
        """Hopper and data-centre Blackwell; on consumer Blackwell the pointer kernels are the tested path."""
        return 90 <= self.capability < 120

    @property
    def has_mma_sync(self) -> bool:
        """Tensor cores fed from registers, by cp.async and ldmatrix: compute capability 8, and consumer Blackwell."""
        return not self.has_tma


# For explain() and the compile tests; at run time the device is asked.
KNOWN_GPUS = {name: Gpu(card.capability, card.sm_count, card.shared_memory) for name, card in CARDS.items()}


@dataclass(frozen=True)
class Tile:
    """block_m x block_n of the output, reduced in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, {self.num_stages} stages"


MAX_ACCUMULATORS = 128  # fp32 registers a thread, of 255, that an accumulator may take
MAX_WARPS = 32  # of a block

# 128x256 is what feeds Hopper's tensor cores at full rate: at 128x128 shared memory serves 160 bytes a cycle of 128.
# (block_m, block_n, block_k, warps, wanted stages, relative speed of one full wave)
_EXPAND_TMA = (
    (128, 256, 64, 8, 4, 1.0),
    (128, 128, 64, 8, 4, 0.8),
    (64, 128, 64, 4, 4, 0.55),
    (64, 64, 64, 4, 4, 0.35),
)
_EXPAND_POINTER = (
    (128, 128, 32, 8, 4, 1.0),
    (64, 128, 32, 4, 4, 0.75),
    (64, 64, 32, 4, 4, 0.5),
)
# 64x64 of the output a warp is what mma.sync wants: fewer bytes of shared memory a product than 64x32 or 32x32 take.
# 8 warps of it are all the registers of an SM; of 4 warps two blocks share one, and fill each other's gaps:
# (8192, 4096, 4096, r = 16) on an H200 as sm_80, us forward: 128x128x64 631, 128x128x32 647, 256x128x64 723.
_EXPAND_MMA_SYNC = (
    (128, 128, 64, 4, 3, 1.0),
    (128, 128, 32, 4, 4, 0.97),
    (64, 128, 32, 4, 4, 0.75),
    (64, 64, 32, 4, 4, 0.5),
)
_EXPAND_TF32 = ((64, 64, 32, 4, 3, 1.0), (32, 64, 32, 4, 3, 0.6))
_EXPAND_IEEE = ((64, 64, 16, 8, 4, 1.0), (32, 64, 32, 4, 3, 0.7))


def shared_memory(tile: Tile, gpu: Gpu, itemsize: int, tma: bool) -> int:
    """Bytes of shared memory a tile needs: operand stages, and half an output tile where the copy engine stores it.

    For mma.sync a step's products begin when its operands are in registers, and Triton gives their buffer away: the
    last of the stages has none.
    """
    buffers = max(tile.num_stages - 1, 1) if gpu.has_mma_sync else tile.num_stages
    stages = buffers * (tile.block_m + tile.block_n) * tile.block_k * itemsize
    return stages + (tile.block_m * tile.block_n // 2 * itemsize + 64 if tma else 0)


def blocks_per_sm(tile: Tile, gpu: Gpu, itemsize: int) -> int:
    """How many blocks of a pointer kernel fit an SM: by shared memory, of which each takes 1 KB more and all together
    have 1 KB more than one may have, and by registers, of which 8 warps may take all."""
    by_memory = (gpu.shared_memory + 1024) // (shared_memory(tile, gpu, itemsize, False) + 1024)
    return max(1, min(by_memory, 8 // tile.num_warps))


def legal(tile: Tile, gpu: Gpu, itemsize: int, tma: bool) -> bool:
    """Whether a tile may be launched on this GPU: powers of two, shared memory, accumulator registers, instruction
    shape."""
    if not all(map(_is_power_of_two, (tile.block_m, tile.block_n, tile.block_k, tile.num_warps))):
        return False
    accumulators = tile.block_m * tile.block_n / (32 * tile.num_warps)
    return (
        shared_memory(tile, gpu, itemsize, tma) <= gpu.shared_memory
        and accumulators <= MAX_ACCUMULATORS
        and min(tile.block_m, tile.block_n, tile.block_k) >= 16
        and tile.num_warps <= MAX_WARPS
        and tile.num_stages >= 1
    )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _fit(tile: Tile, gpu: Gpu, itemsize: int, tma: bool) -> Tile:
    """The tile with as many stages as fit."""
    while not legal(tile, gpu, itemsize, tma) and tile.num_stages > 1:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


@cache
def _expand_speeds(gpu: Gpu, itemsize: int, tma: bool, precision: str, in_eights: bool) -> dict[Tile, float]:
    """The legal tiles of the expand kernel with their relative speeds."""
    if itemsize == 4:
        table = _EXPAND_TF32 if precision == "tf32" else _EXPAND_IEEE
    else:
        by_cp_async = gpu.has_mma_sync and in_eights
        table = _EXPAND_TMA if tma else _EXPAND_MMA_SYNC if by_cp_async else _EXPAND_POINTER
    fitted = {_fit(Tile(*row[:5]), gpu, itemsize, tma): row[5] for row in table}
    if table is _EXPAND_MMA_SYNC:  # 4 warps alone on an SM are too few
        fitted = {tile: speed for tile, speed in fitted.items() if blocks_per_sm(tile, gpu, itemsize) > 1}
    return {tile: speed for tile, speed in fitted.items() if legal(tile, gpu, itemsize, tma)}


def expand_candidates(gpu: Gpu, itemsize: int, tma: bool, precision: str, in_eights: bool = True) -> list[Tile]:
    """What expand_tile chooses from."""
    return list(_expand_speeds(gpu, itemsize, tma, precision, in_eights))


def expand_tile(M: int, N: int, gpu: Gpu, itemsize: int, tma: bool, precision: str, in_eights: bool = True) -> Tile:
    """The tile whose waves over the SMs take the least time. in_eights: the operands' rows are 16-byte pieces; others
    pass through registers, which then do not hold the largest tiles."""

    speeds = _expand_speeds(gpu, itemsize, tma, precision, in_eights)

    def time(tile: Tile) -> float:
        waves = ceil(ceil(M / tile.block_m) * ceil(N / tile.block_n) / gpu.sm_count)
        return waves * tile.block_m * tile.block_n / speeds[tile]

    return min(speeds, key=time)


def rank_block(r: int, most: int) -> int:
    """r rounded up to a power of two, between 16 (the least a tensor core takes) and `most`."""
    return min(max(16, 1 << (r - 1).bit_length()), most)


@cache
def shrink_tile(r: int, gpu: Gpu, itemsize: int, precision: str) -> Tile:
    """Tall tiles that hold all of r up to 256 (128 where pointers take registers): the long operand is read once."""
    if itemsize == 4:
        # Without tensor cores an accumulator costs registers twice.
        tile = Tile(64, rank_block(r, 64), 32, 4, 3) if precision == "tf32" else Tile(32, rank_block(r, 32), 32, 4, 3)
    elif gpu.has_mma_sync:
        block_n = rank_block(r, 128)
        tile = Tile(32, block_n, 128, 4, 4) if block_n <= 32 else Tile(64, block_n, 64, 4, 4)
    else:
        block_n = rank_block(r, 256)
        tile = Tile(64, block_n, 128 if block_n <= 128 else 64, 4, 4)
    return _fit(tile, gpu, itemsize, tma=False)


@cache
def factor_grad_tile(r: int, gpu: Gpu, itemsize: int, precision: str, num_warps: int = 8) -> Tile:
    """block_m columns of x or dy, block_n of r, block_k tokens a step; num_warps are those of the launch it is in."""
    if itemsize == 4:
        tf32 = precision == "tf32"
        # With 8 warps mma.sync's spills.
        tile = Tile(64, rank_block(r, 64 if tf32 else 32), 32, 4 if tf32 and gpu.has_mma_sync else 8, 3)
    else:
        block_n = rank_block(r, 128)
        if gpu.has_mma_sync:
            tile = Tile(256, block_n, 32, 8, 4) if block_n == 128 else Tile(128, block_n, 64, 4, 3)
        elif block_n <= 32:
            tile = Tile(128, block_n, 128, num_warps, 4)
        else:
            tile = Tile(32 * num_warps, block_n, 64, num_warps, 4)
    return _fit(tile, gpu, itemsize, tma=False)


@cache
def merge_tile(r: int, gpu: Gpu, itemsize: int) -> Tile:
    """block_m x block_n of the weight, block_k of r."""
    side = 64 if itemsize == 4 else 128
    return _fit(Tile(side, side, rank_block(r, 32), 8, 2), gpu, itemsize, tma=False)


@cache
def restart_tile(
    rank_block: int, gpu: Gpu, itemsize: int, aligned: bool, has_low: bool, stochastic: bool
) -> tuple[Tile, int]:
    """(tile as merge_tile's, tiles along a row that one program walks over with B held)."""
    plain = not has_low and not stochastic
    if itemsize == 4:
        tile = Tile(64, 64 if plain else 32, min(rank_block, 32), 8, 2)
    elif aligned and plain:
        tile = Tile(64, 128, min(rank_block, 128), 8, 1)
    elif aligned:
        tile = Tile(64, 64, min(rank_block, 128), 4 if rank_block <= 128 else 8, 1)
    elif not has_low:
        # Rows that are not aligned take an address an entry.
        tile = Tile(64, 128, min(rank_block, 128), 4, 1) if gpu.has_tma else Tile(64, 64, min(rank_block, 128), 8, 1)
    else:
        tile = Tile(64, 32, min(rank_block, 128), 8, 1)
    return _fit(tile, gpu, itemsize, tma=False), 8


MAX_SLICES = 32
SLICE_COST = 0.003  # of the uncut reduction: what writing and adding up one more slice takes


def split(
    depth: int, block_k: int, pieces: int, gpu: Gpu, per_sm: int = 1, slice_cost: float = SLICE_COST
) -> tuple[int, int]:
    """(slices, depth of a slice): `pieces` tiles are cut along the reduction, at four steps a slice or more,
    where that fills the waves over the SMs better, per_sm blocks on each."""
    steps = ceil(depth / block_k)

    def time(slices: int) -> float:
        return ceil(pieces * slices / (gpu.sm_count * per_sm)) / slices + slice_cost * slices

    slices = min(range(1, _most_slices(steps) + 1), key=time)
    return _slices(steps, slices, block_k)


def split_to_fill(depth: int, block_k: int, pieces: int, gpu: Gpu) -> tuple[int, int]:
    """As split, for kernels that wait for memory: once every SM has a block, more slices bring nothing."""
    steps = ceil(depth / block_k)
    return _slices(steps, min(max(1, round(gpu.sm_count / pieces)), _most_slices(steps)), block_k)


def _most_slices(steps: int) -> int:
    return max(1, min(steps // 4, MAX_SLICES))


def _slices(steps: int, slices: int, block_k: int) -> tuple[int, int]:
    steps_per_slice = ceil(steps / slices)
    return ceil(steps / steps_per_slice), steps_per_slice * block_k
