from itertools import product

import pytest

from fused_lora.kernels import tiles
from fused_lora.kernels.tiles import KNOWN_GPUS, Gpu, Tile

# Cards that are not in the table too: Orin, B200, GB300, RTX 5090.
GPUS = [*KNOWN_GPUS.values(), Gpu(87, 16, 166912), Gpu(100, 148, 232448), Gpu(103, 152, 232448), Gpu(120, 170, 101376)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.capability}-{gpu.sm_count}")
def test_every_choice_is_legal(gpu):
    kinds = [(2, "ieee"), (4, "ieee"), (4, "tf32")]
    for M, N, (itemsize, precision) in product((1, 100, 2048, 40_000), (1, 512, 5461), kinds):
        tma = gpu.has_tma and itemsize == 2
        assert tiles.legal(tiles.expand_tile(M, N, gpu, itemsize, tma, precision), gpu, itemsize, tma)
    for r, (itemsize, precision) in product((1, 16, 17, 128, 512), kinds):
        assert tiles.legal(tiles.shrink_tile(r, gpu, itemsize, precision), gpu, itemsize, False)
        assert tiles.legal(tiles.factor_grad_tile(r, gpu, itemsize, precision), gpu, itemsize, False)


def test_what_is_illegal():
    gpu = KNOWN_GPUS["RTX 3090"]
    assert not tiles.legal(Tile(128, 256, 64, 8, 4), gpu, 2, False)  # shared memory
    assert not tiles.legal(Tile(128, 256, 16, 4, 1), gpu, 2, False)  # accumulator registers
    assert not tiles.legal(Tile(8, 64, 32, 4, 2), gpu, 2, False)  # instruction shape
    for wrong in [(96, 64, 32, 4, 2), (64, 0, 32, 4, 2), (64, 64, -32, 4, 2), (64, 64, 48, 4, 2)]:
        assert not tiles.legal(Tile(*wrong), gpu, 2, False)  # powers of two
    for warps in (0, -4, 3, 64):
        assert not tiles.legal(Tile(64, 64, 32, warps, 2), gpu, 2, False)
    assert not tiles.legal(Tile(64, 64, 32, 4, 0), gpu, 2, False)
    assert tiles.legal(Tile(128, 128, 32, 8, 3), gpu, 2, False)


def test_few_tokens_get_small_tiles():
    gpu = KNOWN_GPUS["H100"]
    large, small = (tiles.expand_tile(M, 4096, gpu, 2, True, "ieee") for M in (8192, 64))
    assert (large.block_m, large.block_n) == (128, 256)
    assert small.block_m * small.block_n < large.block_m * large.block_n


@pytest.mark.parametrize("depth", [1, 100, 4096, 33_000])
@pytest.mark.parametrize("pieces", [1, 31, 128, 5000])
def test_slices_cover_the_depth_once(depth, pieces):
    slices, size = tiles.split(depth, 64, pieces, KNOWN_GPUS["H100"])
    assert size % 64 == 0
    assert (slices - 1) * size < depth <= slices * size
